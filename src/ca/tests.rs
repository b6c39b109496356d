pub(crate) mod support;

use std::collections::HashSet;

use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    oid_registry,
    prelude::FromDer,
};

use super::{
    rotation::RotationPolicy,
    tests::support::{DAY, HOUR, at, authority, founded, mesh, new_key, roll, workload},
    *,
};
use crate::{ca::csr::KeyPolicy, identity::SpiffeId};

const NOON: &str = "2026-11-22T12:00:00.7Z";

fn parse(der: &[u8]) -> X509Certificate<'_> {
    let (rest, certificate) = X509Certificate::from_der(der).expect("a certificate");
    assert!(rest.is_empty());
    certificate
}

fn names(certificate: &X509Certificate<'_>) -> (bool, Vec<String>) {
    let names = certificate
        .subject_alternative_name()
        .expect("readable")
        .expect("a name");
    let text = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => format!("URI:{uri}"),
        GeneralName::DNSName(name) => format!("DNS:{name}"),
        GeneralName::IPAddress(bytes) => format!("IP:{bytes:?}"),
        other => format!("{other:?}"),
    };
    let all = names.value.general_names.iter().map(text).collect();
    (names.critical, all)
}

/// The bits of KeyUsage, first bit lowest; it must be critical.
fn usage(certificate: &X509Certificate<'_>) -> u16 {
    let usage = certificate.key_usage().expect("readable").expect("a usage");
    assert!(usage.critical);
    usage.value.flags
}

const DIGITAL_SIGNATURE: u16 = 1;
const KEY_ENCIPHERMENT: u16 = 1 << 2;
const CERT_AND_CRL_SIGN: u16 = 1 << 5 | 1 << 6;

/// CA, path length; BasicConstraints must be there and critical.
fn constraints(certificate: &X509Certificate<'_>) -> (bool, Option<u32>) {
    let found = certificate.basic_constraints().expect("readable");
    let found = found.expect("BasicConstraints");
    assert!(found.critical);
    (found.value.ca, found.value.path_len_constraint)
}

fn key_ids(certificate: &X509Certificate<'_>) -> (Option<String>, Option<String>) {
    let mut ids = (None, None);
    for extension in certificate.iter_extensions() {
        let hex = |bytes: &[u8]| KeyId(bytes.to_owned()).to_string();
        match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => ids.0 = Some(hex(id.0)),
            ParsedExtension::AuthorityKeyIdentifier(id) => {
                ids.1 = id.key_identifier.as_ref().map(|id| hex(id.0));
            }
            _ => {}
        }
    }
    ids
}

fn span(certificate: &X509Certificate<'_>) -> Validity {
    let instant = |time: x509_parser::time::ASN1Time| {
        Timestamp::from_second(time.timestamp()).expect("an instant")
    };
    Validity {
        not_before: instant(certificate.validity().not_before),
        not_after: instant(certificate.validity().not_after),
    }
}

fn issue(authority: &Authority, profile: &Profile, now: Timestamp) -> Issued {
    let key = new_key().public_key();
    let serial = Serial::for_workload(now, roll());
    authority
        .issue(&key, profile, DAY, serial, now)
        .expect("a certificate")
}

#[test]
fn g03_root_and_intermediate_are_as_the_profile_says() {
    let journal = founded(at(NOON), &RotationPolicy::default());
    let root = journal.active();
    let intermediate = &root.intermediates[0].certificate;
    let certificate = parse(root.certificate.der());
    let id = root.id().to_string();
    let subject = format!("O=cluster.local, CN=malha root {}", &id[..16]);
    assert_eq!(certificate.subject().to_string(), subject);
    assert_eq!(certificate.issuer().to_string(), subject);
    assert_eq!(
        names(&certificate),
        (false, vec!["URI:spiffe://cluster.local".into()])
    );
    assert_eq!(constraints(&certificate), (true, None));
    assert_eq!(usage(&certificate), CERT_AND_CRL_SIGN);
    assert_eq!(certificate.extended_key_usage().expect("readable"), None);
    assert_eq!(key_ids(&certificate), (Some(id.clone()), None));
    assert_eq!(span(&certificate).not_before, at("2026-11-22T11:50:00Z"));
    assert_eq!(span(&certificate).not_after, at("2031-11-21T12:00:00Z"));

    let certificate = parse(intermediate.der());
    let own = intermediate.id().to_string();
    assert_eq!(
        certificate.subject().to_string(),
        format!("O=cluster.local, CN=malha intermediate {}", &own[..16])
    );
    assert_eq!(certificate.issuer().to_string(), subject);
    assert_eq!(
        names(&certificate),
        (false, vec!["URI:spiffe://cluster.local".into()])
    );
    assert_eq!(constraints(&certificate), (true, Some(0)));
    assert_eq!(usage(&certificate), CERT_AND_CRL_SIGN);
    assert_eq!(certificate.extended_key_usage().expect("readable"), None);
    assert_eq!(key_ids(&certificate), (Some(own), Some(id)));
    assert_eq!(span(&certificate).not_before, at("2026-11-22T11:50:00Z"));
    assert_eq!(span(&certificate).not_after, at("2026-12-22T12:00:00Z"));
}

#[test]
fn leaves_are_as_their_profiles_say() {
    let now = at(NOON);
    let authority = authority(&founded(now, &RotationPolicy::default()));
    let id: SpiffeId = "spiffe://cluster.local/ns/malha-system/sa/malha"
        .parse()
        .expect("an id");
    let hosts = vec![
        "malha.malha-system.svc".to_owned(),
        "malha.malha-system".to_owned(),
    ];
    let control_plane = Profile::ControlPlane {
        id,
        dns_names: hosts.clone(),
    };
    let standalone = vec![
        "localhost".to_owned(),
        "127.0.0.1".to_owned(),
        "::1".to_owned(),
    ];
    let table = [
        (
            workload("shop", "web"),
            vec!["URI:spiffe://cluster.local/ns/shop/sa/web"],
            (true, true),
        ),
        (
            control_plane,
            vec![
                "URI:spiffe://cluster.local/ns/malha-system/sa/malha",
                "DNS:malha.malha-system.svc",
                "DNS:malha.malha-system",
            ],
            (true, true),
        ),
        (
            Profile::Webhook {
                dns_names: hosts[..1].to_vec(),
            },
            vec!["DNS:malha.malha-system.svc"],
            (true, false),
        ),
        (
            Profile::Webhook {
                dns_names: standalone,
            },
            vec![
                "DNS:localhost",
                "IP:[127, 0, 0, 1]",
                "IP:[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]",
            ],
            (true, false),
        ),
    ];
    for (profile, want_names, (server, client)) in table {
        let issued = issue(&authority, &profile, now);
        let leaf = parse(&issued.chain[0]);
        assert_eq!(issued.chain.len(), 2);
        assert!(leaf.subject().as_raw() == [0x30, 0], "the subject is empty");
        let (critical, names) = names(&leaf);
        assert!(
            critical,
            "the names of a certificate without subject are critical"
        );
        assert_eq!(names, want_names);
        assert_eq!(constraints(&leaf), (false, None));
        assert_eq!(usage(&leaf), DIGITAL_SIGNATURE);
        let extended = leaf
            .extended_key_usage()
            .expect("readable")
            .expect("usages")
            .value;
        assert_eq!(
            (extended.server_auth, extended.client_auth),
            (server, client)
        );
        assert!(!extended.any && extended.other.is_empty() && !extended.code_signing);
        let (own, issuer) = key_ids(&leaf);
        assert!(own.is_some());
        assert_eq!(issuer, Some(authority.issuer_key_id().to_string()));
        assert_eq!(span(&leaf), issued.validity);
        assert_eq!(issued.validity.not_before, at("2026-11-22T11:55:00Z"));
        assert_eq!(issued.validity.not_after, at("2026-11-23T12:00:00Z"));
        assert_eq!(leaf.raw_serial(), issued.serial.as_bytes());
        assert_eq!(leaf.extensions().len(), 6, "and nothing else");
        for host in profile.dns_names() {
            peer::verify_name(&issued.chain, host).expect(host);
        }
    }
}

#[test]
fn rsa_leaves_may_also_encipher_keys() {
    let now = at(NOON);
    let authority = authority(&founded(now, &RotationPolicy::default()));
    use rcgen::PublicKeyData;
    let rsa = rcgen::KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).expect("a key");
    let key =
        PublicKey::parse(&rsa.subject_public_key_info(), KeyPolicy::default()).expect("a good key");
    let serial = Serial::random(roll());
    let issued = authority
        .issue(&key, &workload("a", "b"), DAY, serial, now)
        .expect("a certificate");
    assert_eq!(
        usage(&parse(&issued.chain[0])),
        DIGITAL_SIGNATURE | KEY_ENCIPHERMENT
    );
    for side in [Side::Server, Side::Client] {
        peer::verify(&issued.chain, authority.bundle(), side, now).expect("accepted");
    }
}

#[test]
fn peers_accept_leaves_and_refuse_signing_certificates_and_wrong_sides() {
    let now = at(NOON);
    let journal = founded(now, &RotationPolicy::default());
    let authority = authority(&journal);
    let issued = issue(&authority, &workload("a", "b"), now);
    for side in [Side::Server, Side::Client] {
        peer::verify(&issued.chain, authority.bundle(), side, now).expect("accepted");
        peer::verify(&issued.chain[1..], authority.bundle(), side, now)
            .expect_err("an intermediate is no peer");
        let root = vec![journal.active().certificate.der().to_owned()];
        peer::verify(&root, authority.bundle(), side, now).expect_err("a root is no peer");
        let stranger = founded(now, &RotationPolicy::default()).bundle();
        peer::verify(&issued.chain, &stranger, side, now).expect_err("another mesh");
        peer::verify(&issued.chain, &Bundle::default(), side, now).expect_err("no trust");
    }
    let webhook = Profile::Webhook {
        dns_names: vec!["malha.malha-system.svc".to_owned()],
    };
    let issued = issue(&authority, &webhook, now);
    peer::verify(&issued.chain, authority.bundle(), Side::Server, now).expect("accepted");
    peer::verify(&issued.chain, authority.bundle(), Side::Client, now).expect_err("a server only");
    peer::verify_name(&issued.chain, "kubernetes.default.svc").expect_err("another name");
    let issued = issue(&authority, &workload("malha-system", "malha"), now);
    peer::verify_name(&issued.chain, "malha.malha-system.svc").expect_err("a workload has none");
    peer::verify(&[], authority.bundle(), Side::Server, now).expect_err("nothing");
}

#[test]
fn g06_no_leaf_outlives_or_precedes_anything_above_it() {
    let founded_at = at(NOON);
    let policy = RotationPolicy::default();
    let journal = founded(founded_at, &policy);
    let authority = authority(&journal);
    let root = journal.active().certificate.validity();
    let end = authority.issuer_validity().not_after;
    let key = new_key().public_key();
    for minutes in 0..(30 * 24 * 60 - 5) {
        let now = founded_at + Duration::from_secs(60 * minutes);
        // Issued only where clamping shows or might go wrong: at the beginning and near the end.
        if (120..29 * 24 * 60 - 60).contains(&minutes) || minutes % 7 != 0 {
            continue;
        }
        let issued = authority
            .issue(&key, &workload("a", "b"), DAY, Serial::random(roll()), now)
            .expect("a certificate");
        let leaf = issued.validity;
        assert!(leaf.not_before >= authority.issuer_validity().not_before);
        assert!(leaf.not_before >= root.not_before && leaf.not_after <= root.not_after);
        assert!(leaf.not_after <= end, "minute {minutes}");
        assert!(leaf.not_after.duration_since(now) >= jiff::SignedDuration::from_mins(5));
        assert_eq!(span(&parse(&issued.chain[0])), leaf);
    }
}

#[test]
fn an_issuer_near_its_end_refuses_instead_of_signing_for_a_second() {
    let now = at(NOON);
    let authority = authority(&founded(now, &RotationPolicy::default()));
    let end = authority.issuer_validity().not_after;
    let key = new_key().public_key();
    let issue = |now| {
        let serial = Serial::random(roll());
        authority.issue(&key, &workload("a", "b"), DAY, serial, now)
    };
    let minutes = |n: u64| Duration::from_secs(60 * n);
    assert_eq!(
        issue(end - minutes(5))
            .expect("just enough")
            .validity
            .not_after,
        end
    );
    for late in [end - minutes(4), end, end + DAY] {
        let error = issue(late).expect_err("too late");
        assert_eq!(error, AuthorityError::IssuerExpiring(end));
        assert_eq!(error.code(), "IssuerExpiring");
    }
}

#[test]
fn g27_a_clock_behind_the_journal_signs_nothing() {
    let now = at(NOON);
    let authority = authority(&founded(now, &RotationPolicy::default()));
    let key = new_key().public_key();
    let issue = |now| {
        let serial = Serial::random(roll());
        authority.issue(&key, &workload("a", "b"), DAY, serial, now)
    };
    let code = |now| issue(now).map_or_else(|e| e.code(), |_| "issued");
    assert_eq!(code(now - Duration::from_secs(290)), "issued");
    assert_eq!(code(now - Duration::from_secs(302)), "ClockJump");
    assert_eq!(code(now - 365 * DAY), "ClockJump");
    assert_eq!(code(Timestamp::MIN), "ClockJump");
    assert_eq!(code(Timestamp::MAX), "IssuerExpiring");
}

#[test]
fn a_leaf_is_accepted_by_a_verifier_whose_clock_is_five_minutes_behind() {
    let founded_at = at(NOON);
    let authority = authority(&founded(founded_at, &RotationPolicy::default()));
    for now in [founded_at, founded_at + 3 * DAY] {
        let issued = issue(&authority, &workload("a", "b"), now);
        for seconds in [0, 5, 30, 60, 300] {
            let theirs = now - Duration::from_secs(seconds);
            peer::verify(&issued.chain, authority.bundle(), Side::Server, theirs)
                .unwrap_or_else(|error| panic!("{seconds} s behind: {error}"));
        }
        let theirs = now - Duration::from_secs(3600);
        peer::verify(&issued.chain, authority.bundle(), Side::Server, theirs)
            .expect_err("an hour behind");
    }
}

#[test]
fn a_journal_that_was_not_read_for_too_long_signs_nothing() {
    let now = at(NOON);
    let authority = authority(&founded(now, &RotationPolicy::default())).fresh_until(now + DAY);
    let key = new_key().public_key();
    let code = |now| {
        let serial = Serial::random(roll());
        let issued = authority.issue(&key, &workload("a", "b"), DAY, serial, now);
        issued.map_or_else(|error| error.code(), |_| "issued")
    };
    assert_eq!(code(now + DAY), "issued");
    assert_eq!(code(now + DAY + Duration::from_secs(1)), "JournalStale");
}

#[test]
fn a_life_stays_within_the_settings_and_what_the_journal_says_was_granted() {
    let now = at(NOON);
    let authority = authority(&founded(now, &RotationPolicy::default()));
    let key = new_key().public_key();
    for life in [8 * DAY, 4000 * DAY, Duration::MAX] {
        let serial = Serial::random(roll());
        let issued = authority
            .issue(&key, &workload("a", "b"), life, serial, now)
            .expect("a certificate");
        assert_eq!(issued.validity.not_after, at("2026-11-29T12:00:00Z"));
    }
    for life in [Duration::ZERO, Duration::from_secs(1)] {
        let serial = Serial::random(roll());
        let issued = authority
            .issue(&key, &workload("a", "b"), life, serial, now)
            .expect("a certificate");
        assert_eq!(issued.validity.not_after, at("2026-11-22T12:05:00Z"));
    }
}

#[test]
fn an_identity_of_another_trust_domain_is_not_signed() {
    let now = at(NOON);
    let authority = authority(&founded(now, &RotationPolicy::default()));
    let id: SpiffeId = "spiffe://cluster.loca1/ns/a/sa/b".parse().expect("an id");
    let key = new_key().public_key();
    let error = authority
        .issue(
            &key,
            &Profile::Workload(id),
            DAY,
            Serial::random(roll()),
            now,
        )
        .expect_err("foreign");
    assert_eq!(error.code(), "SignFailed");
}

#[test]
fn names_that_nobody_can_dial_are_not_signed() {
    let now = at(NOON);
    let authority = authority(&founded(now, &RotationPolicy::default()));
    let key = new_key().public_key();
    for names in [
        vec![],
        vec!["a b"],
        vec!["*"],
        vec!["x\n"],
        vec!["ü"],
        vec![""],
    ] {
        let dns_names = names.into_iter().map(ToOwned::to_owned).collect();
        let profile = Profile::Webhook { dns_names };
        authority
            .issue(&key, &profile, DAY, Serial::random(roll()), now)
            .expect_err("no such host");
    }
}

#[test]
fn g05_serials_are_positive_and_never_repeat() {
    let now = at(NOON);
    let key = new_key().public_key();
    let journal = founded(now, &RotationPolicy::default());
    let replicas = [authority(&journal), authority(&journal)];
    let mut seen = HashSet::new();
    for _ in 0..500 {
        for replica in &replicas {
            let serial = Serial::for_workload(now, roll());
            let issued = replica
                .issue(&key, &workload("a", "b"), DAY, serial, now)
                .expect("a certificate");
            let leaf = parse(&issued.chain[0]);
            assert!(leaf.raw_serial()[0] < 0x80 && leaf.raw_serial().len() <= 20);
            assert!(seen.insert(leaf.raw_serial().to_owned()));
        }
    }
}

#[test]
fn serials_carry_the_hour_of_the_last_token() {
    let proof = at("2026-11-22T12:34:56Z");
    let serial = Serial::for_workload(proof, [0xff; 12]);
    let hours =
        (at("2026-11-22T12:00:00Z").as_second() - at("2020-01-01T00:00:00Z").as_second()) / 3600;
    assert_eq!(
        serial.to_string(),
        format!("{:08x}{}", 0x4000_0000 + hours, "ff".repeat(12))
    );
    assert_eq!(serial.token_proof(), Some(at("2026-11-22T12:00:00Z")));
    for (proof, first) in [
        (at("2019-01-01T00:00:00Z"), 0x4000_0000_u32),
        (Timestamp::MIN, 0x4000_0000),
        (at("2020-01-01T00:59:59Z"), 0x4000_0000),
        (at("2020-01-01T01:00:00Z"), 0x4000_0001),
    ] {
        let serial = Serial::for_workload(proof, [0; 12]);
        assert_eq!(serial.as_bytes()[..4], first.to_be_bytes());
    }
    assert_eq!(Serial::random([0; 16]).as_bytes()[15], 1, "never zero");
    assert_eq!(
        Serial::random([0x80; 16]).as_bytes()[0],
        0,
        "never negative"
    );
    assert_eq!(Serial::random([0x81; 16]).token_proof(), None);
}

#[test]
fn small_serials_are_written_as_small_numbers() {
    let now = at(NOON);
    let authority = authority(&founded(now, &RotationPolicy::default()));
    let key = new_key().public_key();
    let mut dice = [0; 16];
    dice[14] = 0x80;
    let issued = authority
        .issue(&key, &workload("a", "b"), DAY, Serial::random(dice), now)
        .expect("a certificate");
    assert_eq!(parse(&issued.chain[0]).raw_serial(), [0, 0x80, 0]);
}

/// UTCTime has tag 23 and ends in 2049; GeneralizedTime has tag 24.
#[test]
fn g07_dates_from_2050_on_are_generalized_times() {
    let times = |der: &[u8]| {
        let tags = [
            (b"\x17\x0d".as_slice(), "utc"),
            (b"\x18\x0f", "generalized"),
        ];
        let mut found: Vec<_> = tags
            .iter()
            .flat_map(|(tag, name)| {
                let positions = der.windows(2).enumerate();
                let hits = positions.filter(|(_, window)| window == tag);
                let dates = hits.filter(|(at, _)| {
                    let digits = der.get(at + 2..at + 14);
                    digits.is_some_and(|d| d.iter().all(u8::is_ascii_digit))
                });
                dates.map(|(at, _)| (at, *name)).collect::<Vec<_>>()
            })
            .collect();
        found.sort_unstable();
        found.into_iter().map(|(_, name)| name).collect::<Vec<_>>()
    };
    for (now, want) in [
        ("2049-12-01T00:00:00Z", ["utc", "utc"]),
        ("2049-12-31T12:00:00Z", ["utc", "generalized"]),
        ("2050-06-01T00:00:00Z", ["generalized", "generalized"]),
    ] {
        let now = at(now);
        let authority = authority(&founded(now, &RotationPolicy::default()));
        let issued = issue(&authority, &workload("a", "b"), now);
        assert_eq!(times(&issued.chain[0]), want, "{now}");
        assert_eq!(span(&parse(&issued.chain[0])), issued.validity);
        peer::verify(&issued.chain, authority.bundle(), Side::Server, now).expect("accepted");
    }
}

#[test]
fn a_long_trust_domain_fits_into_the_subject() {
    let now = at(NOON);
    let domain: TrustDomain = "d".repeat(255).parse().expect("255 bytes are allowed");
    let (journal, _) = rotation::first(
        &domain,
        new_key(),
        new_key(),
        [roll(), roll()],
        now,
        &RotationPolicy::default(),
    )
    .expect("a first journal");
    let root = parse(journal.active().certificate.der());
    let organization = root.subject().iter_organization().next().expect("an O");
    assert_eq!(organization.as_str().expect("text").len(), 64);
    authority(&journal).rehearse(now).expect("peers accept it");
}

#[test]
fn signing_certificates_use_ecdsa_with_sha256() {
    let journal = founded(at(NOON), &RotationPolicy::default());
    for certificate in [
        &journal.active().certificate,
        &journal.active().intermediates[0].certificate,
    ] {
        let certificate = parse(certificate.der());
        assert_eq!(
            certificate.signature_algorithm.algorithm,
            oid_registry::OID_SIG_ECDSA_WITH_SHA256
        );
    }
}

#[test]
fn nothing_that_holds_a_key_prints_it() {
    let now = at(NOON);
    let journal = founded(now, &RotationPolicy::default());
    let key = new_key();
    let authority = authority(&journal);
    let issued = authority
        .issue(
            &key.public_key(),
            &workload("a", "b"),
            HOUR,
            Serial::random(roll()),
            now,
        )
        .expect("a certificate");
    let keyed = KeyedChain::new(issued, &key);
    let printed = format!("{journal:?} {key:?} {authority:?} {keyed:?}");
    assert!(printed.contains("redacted"));
    let secrets = [
        key.pkcs8(),
        journal.active().key.as_ref().expect("a key").pkcs8(),
    ];
    for secret in secrets {
        let list = format!("{secret:?}");
        let inner = list.trim_matches(['[', ']']);
        assert!(!printed.contains(&inner[..40.min(inner.len())]));
    }
    assert!(!printed.contains("308187") && !printed.contains("MIGH"));
}

mod bundles {
    use proptest::prelude::{any, prop_assert_eq, proptest};

    use super::*;

    fn roots(count: usize) -> Bundle {
        let now = at(NOON);
        let policy = RotationPolicy::default();
        let journals: Vec<_> = (0..count).map(|_| founded(now, &policy)).collect();
        Bundle::of(journals.iter().map(|journal| &journal.active().certificate))
    }

    #[test]
    fn every_replica_writes_the_same_text_sorted_by_key_id() {
        let bundle = roots(5);
        let text = bundle.to_pem();
        let read = Bundle::parse_pem(text.as_bytes()).expect("our own text");
        assert_eq!(read, bundle);
        assert_eq!(read.to_pem(), text);
        assert!(text.ends_with("-----END CERTIFICATE-----\n"));
        let ids: Vec<_> = pem::parse(text.as_bytes())
            .expect("PEM")
            .blocks
            .iter()
            .map(|block| certificate::key_id(&block.der).expect("a certificate"))
            .collect();
        assert!(ids.is_sorted(), "{ids:?}");
        assert_eq!((ids.len(), bundle.len()), (5, 5));
    }

    #[test]
    fn what_is_no_bundle_is_refused_as_a_whole() {
        let bundle = roots(1).to_pem();
        let key = pem::encode("PRIVATE KEY", b"x");
        let der = pem::encode("CERTIFICATE", b"not DER");
        let certificate = roots(1);
        let longer = [certificate.certificates().next().expect("one"), &[0]].concat();
        let longer = pem::encode("CERTIFICATE", &longer);
        for text in ["", "\n", "garbage", &key, &der, &longer] {
            assert!(Bundle::parse_pem(text.as_bytes()).is_err(), "{text}");
        }
        for spoiled in [
            format!("{bundle}{key}"),
            format!("{bundle}{der}"),
            format!("{bundle}-----BEGIN X-----"),
        ] {
            assert!(Bundle::parse_pem(spoiled.as_bytes()).is_err(), "{spoiled}");
        }
    }

    proptest! {
        #[test]
        fn r02_order_blanks_comments_and_the_last_newline_do_not_matter(
            order in proptest::sample::subsequence(vec![0usize, 1, 2, 3], 4).prop_shuffle(),
            crlf in any::<bool>(),
            comment in "[ a-zA-Z0-9#:.]{0,40}",
            blanks in 0usize..3,
            twice in any::<bool>(),
            trimmed in any::<bool>(),
        ) {
            use std::sync::OnceLock;
            static ROOTS: OnceLock<Bundle> = OnceLock::new();
            let bundle = ROOTS.get_or_init(|| roots(4));
            let blocks: Vec<String> =
                bundle.certificates().map(|der| pem::encode("CERTIFICATE", der)).collect();
            let mut text = String::new();
            for index in order.iter().chain(order.iter().take(usize::from(twice))) {
                text.push_str(&format!("{}{comment}\n{}", "\n".repeat(blanks), blocks[*index]));
            }
            if crlf { text = text.replace('\n', "\r\n"); }
            if trimmed { text = text.trim_end().to_owned(); }
            prop_assert_eq!(&Bundle::parse_pem(text.as_bytes()).expect("a bundle"), bundle);
        }

        #[test]
        fn no_bytes_panic(text in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Bundle::parse_pem(&text);
        }
    }

    use proptest::strategy::Strategy;
}

#[test]
fn the_trust_set_is_of_the_mesh() {
    let journal = founded(at(NOON), &RotationPolicy::default());
    assert_eq!(*authority(&journal).trust_domain(), mesh());
    assert_eq!(authority(&journal).bundle(), &journal.bundle());
    assert_eq!(journal.bundle().len(), 1);
}
