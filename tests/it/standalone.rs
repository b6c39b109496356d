//! A mesh in a directory: who may look in, who may write, and what a killed process leaves behind.

use std::{
    collections::BTreeSet,
    env, fs,
    os::unix::{
        fs::{PermissionsExt, symlink},
        process::ExitStatusExt,
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use malha::{
    ca::{
        journal::{HomeError, Journal, JournalHome, Stored},
        rotation::RotationPolicy,
    },
    caller::Authenticate,
    clock::Clock,
    custody::{Custody, CustodyError, RotateRequest, rotate},
    identity::TrustDomain,
    standalone::{Directory, DirectoryError, FileHome, LocalTokens, TokenMaker},
};
use nix::sys::resource::{Resource, setrlimit};

const NOW: &str = "2026-11-22T10:00:00Z";

fn now() -> Timestamp {
    NOW.parse().unwrap()
}

fn clock() -> Clock {
    Clock::new(now)
}

fn mesh() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn names(path: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(path).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

async fn open(directory: &Directory) -> Result<Arc<Custody<FileHome>>, CustodyError> {
    let home = FileHome::new(directory.clone());
    Custody::open(
        home,
        RotationPolicy::default(),
        mesh(),
        clock(),
        malha::custody::Metrics::default(),
    )
    .await
}

#[test]
fn a_new_directory_is_for_its_owner_alone() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("deep/er/mesh");
    let directory = Directory::open(&path).unwrap();
    assert_eq!(mode(directory.path()), 0o700);
    // opened again, and an empty one of everybody's is taken too
    Directory::open(&path).unwrap();
    let empty = place.path().join("empty");
    fs::create_dir(&empty).unwrap();
    set_mode(&empty, 0o755);
    Directory::open(&empty).unwrap();
    assert_eq!(mode(&empty), 0o700);
}

#[test]
fn a_directory_that_holds_something_is_never_closed_behind_its_users_back() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("home");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("letter"), "").unwrap();
    set_mode(&path, 0o755);
    let refused = Directory::open(&path).unwrap_err();
    assert!(
        matches!(refused, DirectoryError::Open { mode: 0o755, .. }),
        "{refused}"
    );
    assert!(refused.to_string().contains("chmod 700"), "{refused}");
    assert_eq!((mode(&path), names(&path).len()), (0o755, 1));
    // the user did as told
    set_mode(&path, 0o700);
    Directory::open(&path).unwrap();
}

#[test]
fn who_only_looks_makes_nothing() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("mistyped");
    let refused = Directory::open_existing(&path).unwrap_err();
    assert!(matches!(refused, DirectoryError::Missing(_)), "{refused}");
    assert!(!path.exists());
    Directory::open(&path).unwrap();
    Directory::open_existing(&path).unwrap();
}

#[test]
fn what_is_no_directory_is_refused_with_words() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(matches!(
        Directory::open(&file),
        Err(DirectoryError::NotADirectory(_))
    ));
    assert!(matches!(
        Directory::open(&file.join("below")),
        Err(DirectoryError::Io { .. })
    ));
}

#[tokio::test]
async fn a_secret_that_others_can_read_is_refused() {
    for name in ["journal.json", "token-key.pem"] {
        for open_mode in [0o644, 0o640, 0o604, 0o660, 0o602] {
            let place = tempfile::tempdir().unwrap();
            let directory = Directory::open(place.path()).unwrap();
            open(&directory).await.unwrap();
            TokenMaker::open(&directory, mesh()).unwrap();
            let secret = directory.path().join(name);
            assert_eq!(mode(&secret), 0o600);
            set_mode(&secret, open_mode);
            let refused = Directory::open(place.path()).unwrap_err();
            assert!(
                matches!(refused, DirectoryError::Exposed { .. }),
                "{refused}"
            );
            assert!(refused.to_string().contains("chmod 600"), "{refused}");
        }
    }
}

#[tokio::test]
async fn a_journal_that_others_can_read_is_not_waited_for() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    open(&directory).await.unwrap();
    let home = FileHome::new(directory.clone());
    let stored = home.load().await.unwrap().unwrap();
    let journal = directory.path().join("journal.json");
    set_mode(&journal, 0o644);
    let read = home.load().await.unwrap_err();
    let replaced = home
        .replace(&stored.version, &stored.journal)
        .await
        .unwrap_err();
    for refused in [read, replaced] {
        let HomeError::Unreadable { fault, .. } = refused else {
            panic!("{refused:?}");
        };
        assert!(fault.contains("mode 0644"), "{fault}");
        assert!(fault.contains("chmod 600"), "{fault}");
    }
    let refused = open(&directory).await.err().unwrap();
    assert!(!refused.is_passing(), "{refused:?}");

    set_mode(&journal, 0o600);
    let elsewhere = place.path().join("elsewhere");
    fs::rename(&journal, &elsewhere).unwrap();
    symlink(&elsewhere, &journal).unwrap();
    let refused = home.load().await.unwrap_err();
    assert!(
        matches!(&refused, HomeError::Unreadable { fault, .. } if fault.contains("not a regular file")),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_secret_that_is_a_link_or_a_pipe_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(&place.path().join("mesh")).unwrap();
    open(&directory).await.unwrap();
    let elsewhere = place.path().join("elsewhere");
    let journal = directory.path().join("journal.json");
    fs::rename(&journal, &elsewhere).unwrap();
    symlink(&elsewhere, &journal).unwrap();
    let refused = Directory::open(directory.path()).unwrap_err();
    assert!(matches!(refused, DirectoryError::NotAFile(_)), "{refused}");
    fs::remove_file(&journal).unwrap();
    assert!(
        Command::new("mkfifo")
            .arg(&journal)
            .status()
            .unwrap()
            .success()
    );
    set_mode(&journal, 0o600);
    let refused = Directory::open(directory.path()).unwrap_err();
    assert!(matches!(refused, DirectoryError::NotAFile(_)), "{refused}");
}

#[tokio::test]
async fn everything_in_it_has_the_mode_it_should_have() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    let _serving = directory.serve().unwrap();
    let custody = open(&directory).await.unwrap();
    TokenMaker::open(&directory, mesh()).unwrap();
    directory
        .write_bundle(custody.authority().bundle())
        .unwrap();
    let modes: Vec<(String, u32)> = names(directory.path())
        .into_iter()
        .map(|name| (name.clone(), mode(&directory.path().join(name))))
        .collect();
    let want = [
        ("bundle.pem", 0o644),
        ("journal.json", 0o600),
        ("lock", 0o600),
        ("serve.lock", 0o600),
        ("token-key.pem", 0o600),
    ];
    assert_eq!(modes, want.map(|(name, mode)| (name.to_owned(), mode)));
    let bundle = fs::read_to_string(directory.bundle()).unwrap();
    assert!(bundle.starts_with("-----BEGIN CERTIFICATE-----") && !bundle.contains("KEY"));
}

#[test]
fn two_servers_on_one_directory_are_one_too_many() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    let serving = directory.serve().unwrap();
    let other = Directory::open(place.path()).unwrap();
    let refused = other.serve().unwrap_err();
    assert!(
        matches!(refused, DirectoryError::AlreadyServed(_)),
        "{refused}"
    );
    drop(serving);
    // A process that another test forks holds a copy of the lock until its exec.
    let free = (0..500).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        other.serve().is_ok()
    });
    assert!(free, "the directory is free again");
}

#[test]
fn a_killed_server_leaves_no_lock() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    let mut server = Other::start("serve", place.path());
    server.wait_until_it_says("serving");
    assert!(matches!(
        directory.serve(),
        Err(DirectoryError::AlreadyServed(_))
    ));
    server.kill();
    directory.serve().unwrap();
}

#[tokio::test]
async fn a_token_names_its_service_account_to_the_same_directory_only() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    let maker = TokenMaker::open(&directory, mesh()).unwrap();
    let life = Duration::from_secs(600);
    let token = maker.mint("prod", "web", life, now()).unwrap();
    let tokens = LocalTokens::open(&directory, mesh()).unwrap();
    let caller = tokens.authenticate(&token, now()).await.unwrap();
    assert_eq!(
        caller.identity.to_string(),
        "spiffe://cluster.local/ns/prod/sa/web"
    );
    assert_eq!(caller.pod, None);

    let elsewhere = tempfile::tempdir().unwrap();
    let elsewhere = Directory::open(elsewhere.path()).unwrap();
    let strangers = LocalTokens::open(&elsewhere, mesh()).unwrap();
    let denial = strangers.authenticate(&token, now()).await.unwrap_err();
    assert_eq!(denial.error.code(), "UnknownIssuer");

    let late = now()
        .checked_add(jiff::SignedDuration::from_secs(660))
        .unwrap();
    let denial = tokens.authenticate(&token, late).await.unwrap_err();
    assert_eq!(denial.error.code(), "TokenExpired");
}

#[test]
fn no_token_is_made_for_names_or_lives_that_are_none() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    let maker = TokenMaker::open(&directory, mesh()).unwrap();
    let minute = Duration::from_secs(60);
    for (namespace, account) in [
        ("", "web"),
        ("prod", ""),
        ("prod", "../web"),
        ("prod:x", "web"),
        ("prod", "a:b"),
        ("Prod", "w"),
    ] {
        assert!(
            maker.mint(namespace, account, minute, now()).is_err(),
            "{namespace} {account}"
        );
    }
    for life in [0, 24 * 3600 + 1] {
        assert!(
            maker
                .mint("prod", "web", Duration::from_secs(life), now())
                .is_err(),
            "{life}"
        );
    }
}

#[tokio::test]
async fn a_token_key_that_was_made_anew_is_taken_up_by_a_running_server() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    let tokens = LocalTokens::open(&directory, mesh()).unwrap();
    fs::remove_file(directory.path().join("token-key.pem")).unwrap();
    let maker = TokenMaker::open(&directory, mesh()).unwrap();
    let token = maker
        .mint("prod", "web", Duration::from_secs(60), now())
        .unwrap();
    // not more often than once a second
    while tokens.authenticate(&token, now()).await.is_err() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[test]
fn a_broken_token_key_says_what_to_do() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    TokenMaker::open(&directory, mesh()).unwrap();
    let key = directory.path().join("token-key.pem");
    for text in [
        &b""[..],
        concat!(
            "-----BEGIN ",
            "PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
        )
        .as_bytes(),
        b"\xff\xfe",
    ] {
        fs::write(&key, text).unwrap();
        let refused = TokenMaker::open(&directory, mesh()).err().unwrap();
        assert!(
            matches!(refused, DirectoryError::BadTokenKey { .. }),
            "{refused}"
        );
        assert!(refused.to_string().contains("remove it"), "{refused}");
    }
}

#[tokio::test]
async fn a_journal_is_made_once_and_replaced_only_by_who_has_seen_it() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    let home = FileHome::new(directory.clone());
    assert!(home.load().await.unwrap().is_none());
    open(&directory).await.unwrap();
    let seen = home.load().await.unwrap().unwrap();
    assert!(matches!(
        home.create(&seen.journal).await,
        Err(HomeError::Conflict { .. })
    ));

    rotate(&home, &RotationPolicy::default(), NOW_AT_ONCE, &clock())
        .await
        .unwrap();
    let newer = home.load().await.unwrap().unwrap();
    assert_ne!(newer.version, seen.version);
    let lost = home.replace(&seen.version, &seen.journal).await;
    assert!(matches!(lost, Err(HomeError::Conflict { .. })));
    let back = home.replace(&newer.version, &seen.journal).await.unwrap();
    assert_eq!(
        back.version, seen.version,
        "the same bytes are the same version"
    );
    assert_eq!(home.load().await.unwrap().unwrap().version, seen.version);
}

/// The intermediate, whether it is due or not.
const NOW_AT_ONCE: RotateRequest = RotateRequest {
    intermediate: true,
    if_due: false,
    dry_run: false,
};

#[tokio::test]
async fn a_lost_journal_is_a_loss_and_not_a_first_start() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    let custody = open(&directory).await.unwrap();
    directory
        .write_bundle(custody.authority().bundle())
        .unwrap();
    open(&directory).await.unwrap();
    fs::remove_file(directory.path().join("journal.json")).unwrap();
    assert!(matches!(
        open(&directory).await,
        Err(CustodyError::JournalLost)
    ));
    assert!(!names(directory.path()).contains("journal.json"));
}

#[tokio::test]
async fn a_journal_that_is_none_is_left_alone() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    let journal = directory.path().join("journal.json");
    open(&directory).await.unwrap();
    let whole = fs::read(&journal).unwrap();
    let half = &whole[..whole.len() / 2];
    for text in [&b""[..], b"{}", b"null", b"\xff", half, br#"{"format":99}"#] {
        fs::write(&journal, text).unwrap();
        let refused = open(&directory).await.err().unwrap();
        let CustodyError::Home(HomeError::Unreadable { home, .. }) = refused else {
            panic!("{refused:?}");
        };
        assert!(home.ends_with("journal.json"), "{home}");
        assert_eq!(fs::read(&journal).unwrap(), text, "nothing was written");
    }
}

#[tokio::test]
async fn half_a_file_of_a_killed_writer_is_thrown_away() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    open(&directory).await.unwrap();
    let before = fs::read(directory.path().join("journal.json")).unwrap();
    for name in ["journal.json.new", "token-key.pem.new", "bundle.pem.new"] {
        fs::write(directory.path().join(name), "-----BEGIN PRIV").unwrap();
    }
    let directory = Directory::open(place.path()).unwrap();
    assert!(
        !names(directory.path())
            .iter()
            .any(|name| name.ends_with(".new"))
    );
    assert_eq!(
        fs::read(directory.path().join("journal.json")).unwrap(),
        before
    );
    // also where the process that goes on is one that was there before
    fs::write(directory.path().join("journal.json.new"), "-----BEGIN PRIV").unwrap();
    let home = FileHome::new(directory.clone());
    rotate(&home, &RotationPolicy::default(), NOW_AT_ONCE, &clock())
        .await
        .unwrap();
    assert!(!names(directory.path()).contains("journal.json.new"));
}

#[tokio::test]
async fn fifty_processes_that_start_at_once_make_one_root_and_one_token_key() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("mesh");
    let mut others: Vec<Other> = (0..50).map(|_| Other::start("open", &path)).collect();
    let said: BTreeSet<String> = others
        .iter_mut()
        .map(|other| other.wait_until_it_says("opened "))
        .collect();
    assert_eq!(said.len(), 1, "{said:?}");
    for other in &mut others {
        assert!(other.child.wait().unwrap().success());
    }
}

#[tokio::test]
async fn writers_at_once_lose_no_write_of_each_other() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    open(&directory).await.unwrap();
    let home = FileHome::new(directory.clone());
    let first = home.load().await.unwrap().unwrap();
    let tasks: Vec<_> = (0..16)
        .map(|_| {
            let (home, first) = (home.clone(), first.clone());
            tokio::spawn(async move { home.replace(&first.version, &other_than(&first)).await })
        })
        .collect();
    let mut won = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(_) => won += 1,
            Err(HomeError::Conflict { .. }) => {}
            Err(e) => panic!("{e}"),
        }
    }
    assert_eq!(won, 1);
}

/// The same journal, one leader later.
fn other_than(stored: &Stored) -> Journal {
    let mut journal: serde_json::Value = serde_json::from_slice(&stored.journal.to_json()).unwrap();
    journal["epoch"] = (stored.journal.epoch() + 1).into();
    Journal::from_json(&serde_json::to_vec(&journal).unwrap()).unwrap()
}

/// A writer is killed at some point of its work, over and over. Whatever the point, the journal is whole, of the same
/// root, and never older than the last one that the writer said was written.
#[tokio::test]
async fn a_writer_killed_at_any_point_loses_nothing() {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open(place.path()).unwrap();
    let root = open(&directory)
        .await
        .unwrap()
        .authority()
        .bundle()
        .to_pem();
    let home = FileHome::new(directory.clone());
    for round in 0..40_u64 {
        let mut writer = Other::start("write", place.path());
        let written = writer.wait_until_it_says("wrote ");
        std::thread::sleep(Duration::from_micros(round * 397));
        writer.kill();
        let directory = Directory::open(place.path()).unwrap();
        assert!(
            !names(directory.path())
                .iter()
                .any(|name| name.ends_with(".new"))
        );
        let stored = home
            .load()
            .await
            .unwrap()
            .unwrap_or_else(|| panic!("gone in round {round}"));
        let epoch = stored.journal.epoch();
        assert!(
            epoch >= count_of(&written),
            "round {round}: {epoch} after {written:?}"
        );
        let custody = open(&directory).await.unwrap();
        assert_eq!(custody.authority().bundle().to_pem(), root, "round {round}");
    }
}

/// As before, but exactly in the middle of a file: the kernel ends the writer at the byte where it may not go on.
#[tokio::test]
async fn a_writer_killed_in_the_middle_of_a_file_loses_nothing() {
    for act in ["open", "write"] {
        for bytes in [0, 1, 200, 1000] {
            let place = tempfile::tempdir().unwrap();
            let directory = Directory::open(place.path()).unwrap();
            let before = match act {
                "open" => None,
                _ => {
                    open(&directory).await.unwrap();
                    Some(fs::read(directory.path().join("journal.json")).unwrap())
                }
            };
            let mut writer = Other::start_with(act, place.path(), &[("MALHA_IT_BYTES", bytes)]);
            let status = writer.child.wait().unwrap();
            assert_eq!(
                status.signal(),
                Some(nix::libc::SIGXFSZ),
                "{act} {bytes}: {status}"
            );
            assert!(
                names(place.path()).contains("journal.json.new"),
                "{act} {bytes}"
            );
            assert_eq!(fs::read(directory.path().join("journal.json")).ok(), before);
            let directory = Directory::open(place.path()).unwrap();
            assert!(
                !names(place.path())
                    .iter()
                    .any(|name| name.ends_with(".new"))
            );
            open(&directory).await.unwrap();
        }
    }
}

fn count_of(said: &str) -> u64 {
    said.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Another process: this very program, running [`other_process`].
struct Other {
    child: Child,
}

impl Other {
    fn start(act: &str, path: &Path) -> Self {
        Self::start_with(act, path, &[])
    }

    fn start_with(act: &str, path: &Path, more: &[(&str, u64)]) -> Self {
        let child = Command::new(env::current_exe().unwrap())
            .args([
                "--exact",
                "standalone::other_process",
                "--ignored",
                "--nocapture",
            ])
            .env("MALHA_IT_ACT", act)
            .env("MALHA_IT_PATH", path)
            .envs(more.iter().map(|(key, value)| (*key, value.to_string())))
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        Self { child }
    }

    fn wait_until_it_says(&mut self, word: &str) -> String {
        use std::io::{BufRead, BufReader};
        let lines = BufReader::new(self.child.stdout.as_mut().unwrap()).lines();
        let mut lines = lines.map(|line| line.unwrap());
        // the test harness may have begun the line
        let found = lines.find_map(|line| line.find(word).map(|at| line[at..].to_owned()));
        found.unwrap_or_else(|| panic!("the other process ended before it said {word:?}"))
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "the other process of the tests above"]
fn other_process() {
    let (Ok(act), Some(path)) = (env::var("MALHA_IT_ACT"), env::var_os("MALHA_IT_PATH")) else {
        return;
    };
    if let Ok(bytes) = env::var("MALHA_IT_BYTES") {
        let bytes = bytes.parse().unwrap();
        setrlimit(Resource::RLIMIT_FSIZE, bytes, bytes).unwrap();
        // the kernel's way to end a process here would leave a core file
        setrlimit(Resource::RLIMIT_CORE, 0, 0).unwrap();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let directory = Directory::open(Path::new(&path)).unwrap();
        let home = FileHome::new(directory.clone());
        match act.as_str() {
            "serve" => {
                let _serving = directory.serve().unwrap();
                println!("serving");
                std::future::pending::<()>().await;
            }
            "open" => {
                let custody = open(&directory).await.unwrap();
                let bundle = custody.authority().bundle().to_pem();
                directory
                    .write_bundle(custody.authority().bundle())
                    .unwrap();
                TokenMaker::open(&directory, mesh()).unwrap();
                let key = fs::read_to_string(directory.path().join("token-key.pem")).unwrap();
                println!("opened {}", (bundle + &key).replace('\n', ""));
            }
            "write" => loop {
                let seen = home.load().await.unwrap().unwrap();
                let next = other_than(&seen);
                home.replace(&seen.version, &next).await.unwrap();
                println!("wrote {}", next.epoch());
            },
            other => panic!("{other}?"),
        }
    });
}
