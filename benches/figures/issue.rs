//! What one certificate costs: from the CSR's DER to the signed chain, beside the two signatures that no
//! implementation can do without (verify the proof of possession, sign the leaf).

use std::{hint::black_box, time::Duration};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, UnparsedPublicKey,
    },
};
use jiff::Timestamp;
use malha::{
    ca::{
        Authority, Serial,
        csr::{Csr, KeyPolicy},
        key::SecretKey,
        profile::Profile,
        rotation::{self, RotationPolicy},
    },
    identity::{SpiffeId, TrustDomain},
};
use rcgen::{CertificateParams, KeyPair};
use x509_parser::{
    certificate::X509Certificate, certification_request::X509CertificationRequest,
    prelude::FromDer as _,
};
use zeroize::Zeroizing;

use crate::{
    Bench,
    clock::{self, Rounds},
};

pub(crate) fn run(bench: &Bench) {
    if !bench.wants(&["issue_cpu", "issue_floor_ratio"]) {
        return;
    }
    let now: Timestamp = "2026-11-22T00:00:00Z".parse().expect("an instant");
    let trust_domain: TrustDomain = "cluster.local".parse().expect("a trust domain");
    let policy = RotationPolicy::default();
    let (journal, _) = rotation::first(
        &trust_domain,
        secret(),
        secret(),
        [[1; 16], [2; 16]],
        now,
        &policy,
    )
    .expect("a first journal");
    let authority = Authority::from_journal(&journal, &policy.leaf).expect("an authority");
    let identity = SpiffeId::new(&trust_domain, "shop", "cart").expect("an identity");
    let profile = Profile::Workload(identity);
    let key = KeyPair::generate().expect("a P-256 key");
    let csr = CertificateParams::default()
        .serialize_request(&key)
        .expect("a CSR")
        .der()
        .to_vec();

    let mut serial = 0_u128;
    let mut issue = || {
        let csr = Csr::parse_der(black_box(&csr), KeyPolicy::default()).expect("a good CSR");
        serial += 1;
        let serial = Serial::random(serial.to_be_bytes());
        authority
            .issue(&csr.public_key, &profile, policy.leaf.default, serial, now)
            .expect("a certificate")
    };

    let (_, request) = X509CertificationRequest::from_der(&csr).expect("a CSR");
    let info = &request.certification_request_info;
    let subject = UnparsedPublicKey::new(
        &ECDSA_P256_SHA256_ASN1,
        info.subject_pki.subject_public_key.data.to_vec(),
    );
    let proof = (info.raw.to_vec(), request.signature_value.data.to_vec());
    let issued = issue();
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).expect("a certificate");
    let to_be_signed = leaf.tbs_certificate.as_ref().to_vec();
    let random = SystemRandom::new();
    let document =
        EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).expect("a key");
    let signer = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, document.as_ref())
        .expect("a key");
    let floor = || {
        subject
            .verify(black_box(&proof.0), &proof.1)
            .expect("the proof holds");
        signer
            .sign(&random, black_box(&to_be_signed))
            .expect("a signature")
    };

    // interleaved, so that whatever else the machine does hits both alike
    let slices = if bench.quick { 4 } else { 40 };
    let (mut whole, mut ratio) = (Rounds::default(), Rounds::default());
    clock::timed(200, &mut || drop(issue()));
    for _ in 0..7 {
        let (mut ours, mut least) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..slices {
            ours += clock::timed(50, &mut || drop(black_box(issue())));
            least += clock::timed(50, &mut || {
                black_box(floor());
            });
        }
        whole.push(ours.as_secs_f64() * 1e6 / f64::from(slices * 50));
        ratio.push(least.as_secs_f64() / ours.as_secs_f64());
    }
    let how = format!(
        "thread CPU of Csr::parse_der and Authority::issue, P-256, CSR of {} bytes, leaf of {} bytes",
        csr.len(),
        issued.chain[0].len()
    );
    bench.figure("issue_cpu", &whole, "us", &how);
    let how = "CPU of verifying the CSR's signature and signing the leaf alone, of the CPU of the whole issuance, in turns of 50";
    bench.figure("issue_floor_ratio", &ratio, "ratio", how);
}

fn secret() -> SecretKey {
    let key = KeyPair::generate().expect("a P-256 key");
    SecretKey::from_pkcs8(Zeroizing::new(key.serialize_der())).expect("a P-256 key")
}
