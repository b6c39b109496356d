use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use proptest::prelude::{any, prop_assert, proptest};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};

use super::*;

const ECDSA_SHA256: &[u8] = b"\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02";
const ECDSA_SHA384: &[u8] = b"\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x03";
const ECDSA_SHA512: &[u8] = b"\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x04";
const ECDSA_SHA1: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x04\x01";
const RSA_SHA256: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0b\x05\x00";
const P256: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07";
const P521: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x23";
const RSA: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00";

fn params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
}

fn request(algorithm: &'static rcgen::SignatureAlgorithm) -> Vec<u8> {
    request_with(&params(), algorithm)
}

fn request_with(
    params: &CertificateParams,
    algorithm: &'static rcgen::SignatureAlgorithm,
) -> Vec<u8> {
    let key = KeyPair::generate_for(algorithm).expect("a key");
    let csr = params.serialize_request(&key).expect("a request");
    csr.der().to_vec()
}

fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len();
    let mut element = vec![tag];
    match length {
        0..=0x7f => element.push(length as u8),
        0x80..=0xff => element.extend([0x81, length as u8]),
        _ => element.extend([0x82, (length >> 8) as u8, length as u8]),
    }
    element.extend_from_slice(content);
    element
}

fn bits(octets: &[u8]) -> Vec<u8> {
    tlv(0x03, &[&[0], octets].concat())
}

fn spki(algorithm: &[u8], key: &[u8]) -> Vec<u8> {
    tlv(0x30, &[tlv(0x30, algorithm), bits(key)].concat())
}

/// An unsigned request: version 0, empty subject, no attributes.
fn info(spki: &[u8]) -> Vec<u8> {
    let parts = [b"\x02\x01\x00".as_slice(), b"\x30\x00", spki, b"\xa0\x00"];
    tlv(0x30, &parts.concat())
}

fn signed(info: &[u8], algorithm: &[u8], signature: &[u8]) -> Vec<u8> {
    tlv(
        0x30,
        &[info.to_vec(), tlv(0x30, algorithm), bits(signature)].concat(),
    )
}

/// A proper request, but for what it says about its signature.
fn p256_signed_as(algorithm: &[u8]) -> Vec<u8> {
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).expect("a key");
    let info = info(&spki(P256, pair.public_key().as_ref()));
    let signature = pair.sign(&SystemRandom::new(), &info).expect("a signature");
    signed(&info, algorithm, signature.as_ref())
}

fn parse(der: &[u8]) -> Result<Csr, CsrError> {
    Csr::parse_der(der, KeyPolicy::default())
}

fn code(der: &[u8]) -> &'static str {
    parse(der).map_or_else(|error| error.code(), |_| "accepted")
}

fn pem_code(text: &[u8]) -> &'static str {
    Csr::parse_pem(text, KeyPolicy::default()).map_or_else(|error| error.code(), |_| "accepted")
}

#[test]
fn p256_p384_and_rsa_are_accepted_and_ed25519_on_request() {
    for (algorithm, kind) in [
        (&rcgen::PKCS_ECDSA_P256_SHA256, KeyKind::P256),
        (&rcgen::PKCS_ECDSA_P384_SHA384, KeyKind::P384),
        (&rcgen::PKCS_RSA_SHA256, KeyKind::Rsa),
        (&rcgen::PKCS_RSA_SHA512, KeyKind::Rsa),
    ] {
        let csr = parse(&request(algorithm)).expect("a good request");
        assert_eq!(csr.public_key.kind(), kind);
    }
    let ed25519 = request(&rcgen::PKCS_ED25519);
    assert_eq!(code(&ed25519), "UnsupportedKey");
    let csr = Csr::parse_der(&ed25519, KeyPolicy { ed25519: true }).expect("it was asked for");
    assert_eq!(csr.public_key.kind(), KeyKind::Ed25519);
}

#[test]
fn the_key_is_certified_as_it_stands_in_the_csr() {
    for algorithm in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_RSA_SHA256,
    ] {
        let der = request(algorithm);
        let key = parse(&der).expect("a good request").public_key;
        use rcgen::PublicKeyData;
        assert_eq!(key.subject_public_key_info(), key.spki());
        assert!(der.windows(key.spki().len()).any(|w| w == key.spki()));
    }
}

fn golden(name: &str) -> Vec<u8> {
    let file = format!("{}/tests/golden/csr/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&file).unwrap_or_else(|error| panic!("{file}: {error}"))
}

#[test]
fn requests_of_openssl_get_the_codes_of_the_table() {
    let table = String::from_utf8(golden("codes.txt")).expect("text");
    assert_eq!(table.lines().count(), 25);
    for line in table.lines() {
        let (name, want) = line.split_once(' ').expect("a name and a code");
        assert_eq!(pem_code(&golden(&format!("{name}.pem"))), want, "{name}");
    }
}

/// rcgen, asked to take a request as it is, takes the key's algorithm from the signature and makes a certificate that
/// nothing can read.
#[test]
fn a_p256_key_in_a_csr_signed_with_another_hash_stays_a_p256_key() {
    for name in ["p256-sha384.pem", "p256-sha512.pem", "p256-greedy.pem"] {
        let csr = Csr::parse_pem(&golden(name), KeyPolicy::default()).expect(name);
        assert_eq!(csr.public_key.kind(), KeyKind::P256);
        assert_eq!(csr.public_key.spki().len(), 91);
    }
}

#[test]
fn a_signature_by_another_hash_or_scheme_than_it_says_is_refused() {
    assert_eq!(code(&p256_signed_as(ECDSA_SHA256)), "accepted");
    let null_where_there_must_be_nothing = [ECDSA_SHA256, b"\x05\x00"].concat();
    for (algorithm, row) in [
        ECDSA_SHA384,
        ECDSA_SHA512,
        ECDSA_SHA1,
        RSA_SHA256,
        b"\x06\x03\x2b\x65\x70",
        &null_where_there_must_be_nothing,
        b"\x05\x00",
    ]
    .into_iter()
    .zip(0..)
    {
        assert_eq!(
            code(&p256_signed_as(algorithm)),
            "BadProofOfPossession",
            "row {row}"
        );
    }
}

#[test]
fn keys_of_other_kinds_are_refused_by_name() {
    let point = |first: u8, length: usize| [vec![first], vec![7; length]].concat();
    let valid = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).expect("a key");
    let compressed = [&[2], &valid.public_key().as_ref()[1..33]].concat();
    let hybrid = [&[6], &valid.public_key().as_ref()[1..]].concat();
    let rsa = |modulus: &[u8], exponent: &[u8]| {
        let numbers = [tlv(0x02, modulus), tlv(0x02, exponent)];
        spki(RSA, &tlv(0x30, &numbers.concat()))
    };
    let modulus = |bytes: usize| [vec![0, 0xc1], vec![0x55; bytes - 1]].concat();
    let explicit = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x30\x03\x02\x01\x01";
    let table = [
        ("P-521", spki(P521, &point(4, 132)), "P-521"),
        (
            "DSA",
            spki(b"\x06\x07\x2a\x86\x48\xce\x38\x04\x01", &[2, 1, 5]),
            "DSA",
        ),
        (
            "explicit curve",
            spki(explicit, &point(4, 64)),
            "without a name",
        ),
        ("off the curve", spki(P256, &point(4, 64)), "no point"),
        ("short point", spki(P256, &point(4, 63)), "uncompressed"),
        ("compressed", spki(P256, &compressed), "uncompressed"),
        ("hybrid", spki(P256, &hybrid), "uncompressed"),
        ("infinity", spki(P256, &[0]), "uncompressed"),
        ("RSA-1024", rsa(&modulus(128), &[1, 0, 1]), "1024 bits"),
        (
            "RSA-2047",
            rsa(&[vec![0x7f], vec![0x55; 255]].concat(), &[1, 0, 1]),
            "2047 bits",
        ),
        ("RSA-4104", rsa(&modulus(513), &[1, 0, 1]), "4104 bits"),
        ("e = 3", rsa(&modulus(256), &[3]), "exponent"),
        (
            "e = 0x10001 with a zero before",
            rsa(&modulus(256), &[0, 1, 0, 1]),
            "readable",
        ),
        (
            "negative modulus",
            rsa(&[vec![0x81], vec![0x55; 255]].concat(), &[1, 0, 1]),
            "readable",
        ),
        (
            "RSA without parameters",
            spki(&RSA[..11], &tlv(0x30, &[])),
            "odd parameters",
        ),
        ("unknown", spki(b"\x06\x03\x2a\x03\x04", &[1]), "1.2.3.4"),
    ];
    for (name, spki, word) in table {
        let algorithm = if name.starts_with('R') || name.starts_with('e') {
            RSA_SHA256
        } else {
            ECDSA_SHA256
        };
        let error = parse(&signed(&info(&spki), algorithm, &[1; 70])).expect_err(name);
        assert_eq!(error.code(), "UnsupportedKey", "{name}: {error}");
        assert!(error.to_string().contains(word), "{name}: {error}");
    }
}

#[test]
fn any_flipped_bit_is_refused() {
    for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_RSA_SHA256] {
        let good = request(algorithm);
        assert_eq!(code(&good), "accepted");
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(code(&bad), "accepted", "bit {bit} of {}", good.len() * 8);
        }
    }
}

#[test]
fn bytes_after_it_or_missing_from_it_are_refused() {
    let good = request(&rcgen::PKCS_ECDSA_P256_SHA256);
    for extra in [&b"\0"[..], b"\n", &good] {
        assert_eq!(code(&[&good, extra].concat()), "InvalidCsr");
    }
    for length in 0..good.len() {
        assert_ne!(code(&good[..length]), "accepted", "{length} bytes");
    }
    // Inside the outer SEQUENCE, after the signature.
    let whole = der::only(der::SEQUENCE, &good).expect("a SEQUENCE");
    assert_eq!(
        code(&tlv(0x30, &[whole, b"\x05\x00"].concat())),
        "InvalidCsr"
    );
    // The same length in more bytes than it needs.
    let ber = [b"\x30\x83\x00".as_slice(), &good[2..]].concat();
    assert_eq!(code(&ber), "InvalidCsr");
}

#[test]
fn a_request_of_another_version_is_refused() {
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).expect("a key");
    let spki = spki(P256, pair.public_key().as_ref());
    let parts = [b"\x02\x01\x02".as_slice(), b"\x30\x00", &spki, b"\xa0\x00"];
    let info = tlv(0x30, &parts.concat());
    let signature = pair.sign(&SystemRandom::new(), &info).expect("a signature");
    assert_eq!(
        code(&signed(&info, ECDSA_SHA384, signature.as_ref())),
        "InvalidCsr"
    );
}

#[test]
fn pem_is_one_block_with_nothing_after_it() {
    let der = request(&rcgen::PKCS_ECDSA_P256_SHA256);
    let text = pem::encode("CERTIFICATE REQUEST", &der);
    let other = pem::encode(
        "CERTIFICATE REQUEST",
        &request(&rcgen::PKCS_ECDSA_P256_SHA256),
    );
    let table = [
        (text.clone(), "accepted"),
        (text.trim_end().to_owned(), "accepted"),
        (text.replace('\n', "\r\n"), "accepted"),
        (pem::encode("NEW CERTIFICATE REQUEST", &der), "accepted"),
        // `openssl req -text` writes what it read above the block.
        (
            format!("Certificate Request:\n    Data:\n{text}"),
            "accepted",
        ),
        (format!("{text}\n \n"), "accepted"),
        (String::new(), "InvalidPem"),
        ("hello".to_owned(), "InvalidPem"),
        (pem::encode("CERTIFICATE", &der), "InvalidPem"),
        (pem::encode("PRIVATE KEY", &der), "InvalidPem"),
        (format!("{text}{other}"), "InvalidPem"),
        (format!("{text}{text}"), "InvalidPem"),
        (format!("{text}x"), "InvalidPem"),
        (
            format!("{text}-----BEGIN CERTIFICATE REQUEST-----\n"),
            "InvalidPem",
        ),
        (
            format!("x -----BEGIN CERTIFICATE REQUEST-----\n{text}"),
            "InvalidPem",
        ),
        (text.replace("-----END", "----END"), "InvalidPem"),
        (text.replacen('M', "!", 1), "InvalidPem"),
        (
            pem::encode("CERTIFICATE REQUEST", &[&der[..], &[0]].concat()),
            "InvalidCsr",
        ),
        (pem::encode("CERTIFICATE REQUEST", b""), "InvalidCsr"),
        (format!("{}{text}", " ".repeat(MAX_BYTES)), "CsrTooLarge"),
    ];
    for (text, want) in table {
        assert_eq!(pem_code(text.as_bytes()), want, "{text}");
    }
    assert_eq!(code(&vec![0x30; MAX_BYTES + 1]), "CsrTooLarge");
    let padded = format!("{}{text}", "\n".repeat(MAX_BYTES - text.len()));
    assert_eq!(pem_code(padded.as_bytes()), "accepted");
}

#[test]
fn what_it_asks_for_is_seen_and_has_no_part_in_the_key() {
    let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web"
        .parse()
        .expect("an id");
    let uri = |text: &str| SanType::URI(text.try_into().expect("ASCII"));
    let mut own = params();
    own.subject_alt_names = vec![uri(&id.to_string())];
    own.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    own.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let mut empty_organization = own.clone();
    empty_organization
        .distinguished_name
        .push(DnType::OrganizationName, "");
    let mut foreign = own.clone();
    foreign.subject_alt_names = vec![uri("spiffe://cluster.local/ns/shop/sa/admin")];
    let mut dns = own.clone();
    dns.subject_alt_names.push(SanType::DnsName(
        "malha.malha-system.svc".try_into().expect("ASCII"),
    ));
    let mut ca = own.clone();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let mut cert_sign = own.clone();
    cert_sign.key_usages.push(KeyUsagePurpose::KeyCertSign);
    let mut code_signing = own.clone();
    code_signing.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
    let mut subject = own.clone();
    subject.distinguished_name.push(DnType::CommonName, "admin");
    for (name, params, beyond) in [
        ("nothing", params(), false),
        ("its own id, as Istio's agents do", own, false),
        ("an empty O", empty_organization, false),
        ("another id", foreign, true),
        ("a DNS name", dns, true),
        ("CA:TRUE", ca, true),
        ("keyCertSign", cert_sign, true),
        ("code signing", code_signing, true),
        ("a subject", subject, true),
    ] {
        let csr = parse(&request_with(&params, &rcgen::PKCS_ECDSA_P256_SHA256)).expect(name);
        assert_eq!(csr.asks_beyond(&id), beyond, "{name}");
    }
}

/// A small generator of numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

#[test]
fn s13_mutated_requests_never_panic_and_never_prove_anything() {
    let mut dice = Dice(20_261_122);
    let mut rich = params();
    rich.subject_alt_names = vec![SanType::DnsName("a.example".try_into().expect("ASCII"))];
    rich.distinguished_name.push(DnType::CommonName, "a");
    rich.is_ca = IsCa::Ca(BasicConstraints::Constrained(3));
    rich.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let seeds = [
        request(&rcgen::PKCS_ECDSA_P256_SHA256),
        request_with(&rich, &rcgen::PKCS_ECDSA_P384_SHA384),
        request_with(&rich, &rcgen::PKCS_RSA_SHA256),
        request_with(&rich, &rcgen::PKCS_ED25519),
    ];
    for round in 0..40_000 {
        let seed = &seeds[dice.below(seeds.len())];
        let mut bytes = seed.clone();
        for _ in 0..=dice.below(4) {
            let at = dice.below(bytes.len().max(1));
            match dice.below(5) {
                _ if bytes.is_empty() => bytes.push(0x30),
                0 => bytes[at] = dice.below(256) as u8,
                1 => bytes[at] ^= 1 << dice.below(8),
                2 => drop(bytes.remove(at)),
                3 => bytes.insert(at, dice.below(256) as u8),
                _ => bytes.truncate(at.max(1)),
            }
        }
        let accepted = Csr::parse_der(&bytes, KeyPolicy { ed25519: true }).is_ok();
        assert_eq!(
            accepted,
            bytes == *seed && bytes.len() > 1,
            "round {round}: {bytes:02x?}"
        );
    }
}

proptest! {
    #[test]
    fn no_bytes_are_a_csr_by_accident(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(parse(&bytes).is_err());
        prop_assert!(Csr::parse_pem(&bytes, KeyPolicy::default()).is_err());
    }
}
