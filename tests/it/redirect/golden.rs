//! Golden rules: `tests/golden/redirect/<case>/{settings.json,want.nft}`, as `nft list` prints them, for a pod with both
//! families; `want-ipv4.nft` and `want-ipv6.nft` where a case has them. `SNAPSHOTS=overwrite` rewrites what is there.

use std::{fs, path::Path, path::PathBuf};

use malha::redirect::{Families, Redirection};

/// The files of a case, and the families of the pod that they are for.
const FILES: [(&str, Families); 3] = [
    ("want.nft", Families::BOTH),
    (
        "want-ipv4.nft",
        Families {
            v4: true,
            v6: false,
        },
    ),
    (
        "want-ipv6.nft",
        Families {
            v4: false,
            v6: true,
        },
    ),
];

#[test]
fn each_golden_setting_becomes_the_rules_that_are_written() {
    let cases = cases();
    assert!(cases.len() >= 5, "the golden settings are gone");
    for case in cases {
        let settings = read(&case);
        let files = FILES
            .into_iter()
            .filter(|(name, _)| *name == "want.nft" || case.join(name).exists());
        for (name, families) in files {
            let (file, got) = (case.join(name), settings.rule_set(families).to_string());
            if std::env::var("SNAPSHOTS").is_ok_and(|value| value == "overwrite") {
                fs::write(&file, &got).expect("a writable tree");
            }
            let want = fs::read_to_string(&file).unwrap_or_default();
            let file = file.display();
            assert_eq!(got, want, "{file}; SNAPSHOTS=overwrite rewrites it");
        }
    }
}

pub(super) fn cases() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/redirect");
    let entries = fs::read_dir(folder).expect("the folder of golden rules");
    let mut cases: Vec<_> = entries.map(|entry| entry.expect("a case").path()).collect();
    cases.sort();
    cases
}

pub(super) fn read(case: &Path) -> Redirection {
    let settings = fs::read_to_string(case.join("settings.json")).expect("settings");
    Redirection::parse(&settings).unwrap_or_else(|error| panic!("{}: {error}", case.display()))
}
