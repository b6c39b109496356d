//! What a real kernel does: connections between real namespaces, and `nft` as the witness of what is installed.

use malha::redirect::Families;
use serde_json::{Value, json};

use super::{
    argument, golden,
    programs::{Held, Image, init, without_netfilter},
    scene::{
        APP, FAR, LOCALHOST, Landed, Namespace, PASSED_ON, POD, PROXY, Scene, WORLD, Who, can_run,
        to,
    },
    settings,
};

const BOTH: [usize; 2] = [0, 1];

/// A pod in which these settings are in force.
fn scene(changes: &Value) -> Scene {
    let scene = Scene::new();
    init(&scene.pod, &[&argument(changes)]).must(0, "IPv4 redirected: inbound to port 15006");
    scene
}

fn landed(at: &'static str, address: &str, port: u16) -> Landed {
    let wanted = to(address, port);
    Landed { at, wanted }
}

fn listed(namespace: &Namespace) -> String {
    // Newer versions of nft have a name for the priority of both chains.
    let listed = namespace.run("nft list table inet malha");
    listed.replace("hook output priority dstnat", "hook output priority -100")
}

#[test]
fn nft_lists_the_rules_as_they_are_printed() {
    if !can_run() {
        return;
    }
    let namespace = Namespace::new();
    for case in golden::cases() {
        let settings = golden::read(&case);
        init(&namespace, &[&settings.to_argument()]).must(0, "redirected");
        let rules = settings.rule_set(Families::BOTH).to_string();
        assert_eq!(listed(&namespace), rules, "{}", case.display());
        // What is printed can be loaded, as whoever saves and restores a ruleset does.
        namespace.run("nft list table inet malha > /dev/null && (echo flush ruleset; nft list table inet malha) | nft -f -");
        init(&namespace, &["--check", &settings.to_argument()]).must(0, "IPv6 checked");
    }
}

#[test]
fn what_enters_the_pod_comes_to_the_proxy_with_its_destination() {
    if !can_run() {
        return;
    }
    let scene = scene(&json!({"excludeInboundPorts": [22, 15020, 15021, 15090]}));
    for family in BOTH {
        let pod = POD[family];
        assert_eq!(
            scene.call_from_world(pod, 8080),
            landed("inbound", pod, 8080)
        );
        for port in [22, 15021] {
            assert_eq!(scene.call_from_world(pod, port), landed("app", pod, port));
        }
    }
}

#[test]
fn only_the_named_ports_are_captured_inbound() {
    if !can_run() {
        return;
    }
    let scene = scene(&json!({"includeInboundPorts": [8080, 15021]}));
    for family in BOTH {
        let pod = POD[family];
        assert_eq!(
            scene.call_from_world(pod, 8080),
            landed("inbound", pod, 8080)
        );
        assert_eq!(scene.call_from_world(pod, 22), landed("app", pod, 22));
        // Named and excluded: excluded, because the agent's ports must never be captured.
        assert_eq!(scene.call_from_world(pod, 15021), landed("app", pod, 15021));
    }
}

#[test]
fn what_the_application_sends_comes_to_the_proxy_and_what_the_proxy_sends_goes_out() {
    if !can_run() {
        return;
    }
    let scene = scene(&json!({}));
    for family in BOTH {
        for address in [WORLD[family], FAR[family]] {
            let outbound = landed("outbound", address, 80);
            assert_eq!(scene.call_from_pod(APP, address, 80), outbound);
            let root = Who { uid: 0, gid: 0 };
            assert_eq!(scene.call_from_pod(root, address, 80), outbound);
            // By the group: a proxy of another user is one all the same, another group of its user is not.
            let group = Who {
                uid: 5000,
                gid: 1337,
            };
            let user = Who {
                uid: 1337,
                gid: 5000,
            };
            for proxy in [PROXY, group] {
                let world = landed("world", address, 80);
                assert_eq!(scene.call_from_pod(proxy, address, 80), world);
            }
            assert_eq!(scene.call_from_pod(user, address, 80), outbound);
        }
        assert!(scene.datagram_arrives(family), "UDP is left alone");
    }
}

#[test]
fn a_pod_that_calls_itself_meets_the_inbound_side_only_through_its_proxy() {
    if !can_run() {
        return;
    }
    let scene = scene(&json!({}));
    for family in BOTH {
        let (pod, localhost) = (POD[family], LOCALHOST[family]);
        let app = landed("app", pod, 8080);
        // The proxy was load-balanced to its own pod: TLS, which its inbound side must end.
        let inbound = landed("inbound", pod, 8080);
        assert_eq!(scene.call_from_pod(PROXY, pod, 8080), inbound);
        // The inbound side passes it on.
        let passed_on = PASSED_ON[family];
        assert_eq!(scene.call_from_pod_as(PROXY, passed_on, pod, 8080), app);
        // A port that is not captured from outside is not captured here.
        assert_eq!(
            scene.call_from_pod(PROXY, pod, 15021),
            landed("app", pod, 15021)
        );
        // The application itself, and everybody by loopback.
        assert_eq!(scene.call_from_pod(APP, pod, 8080), app);
        for who in [APP, PROXY] {
            let by_loopback = landed("app", localhost, 8080);
            assert_eq!(scene.call_from_pod(who, localhost, 8080), by_loopback);
        }
    }
}

#[test]
fn outbound_ports_ranges_and_users_are_left_alone() {
    if !can_run() {
        return;
    }
    let scene = scene(&json!({
        "excludeOutboundPorts": [25], "excludeOutboundUids": [1000],
        "excludeOutboundIPRanges": ["192.0.2.0/24", "2001:db8::/32"],
    }));
    let other = Who {
        uid: 2000,
        gid: 2000,
    };
    for family in BOTH {
        let (near, far) = (WORLD[family], FAR[family]);
        assert_eq!(
            scene.call_from_pod(other, near, 80),
            landed("outbound", near, 80)
        );
        assert_eq!(
            scene.call_from_pod(other, near, 25),
            landed("world", near, 25)
        );
        assert_eq!(
            scene.call_from_pod(other, far, 80),
            landed("world", far, 80)
        );
        assert_eq!(
            scene.call_from_pod(APP, near, 80),
            landed("world", near, 80)
        );
    }
}

#[test]
fn outbound_ports_are_captured_whatever_their_address_and_ranges_whatever_their_port() {
    if !can_run() {
        return;
    }
    let scene = scene(&json!({
        "includeOutboundPorts": [443], "includeOutboundIPRanges": ["192.0.2.0/25", "2001:db8::/33"],
    }));
    for family in BOTH {
        let (near, far) = (WORLD[family], FAR[family]);
        assert_eq!(
            scene.call_from_pod(APP, near, 443),
            landed("outbound", near, 443)
        );
        assert_eq!(
            scene.call_from_pod(APP, near, 80),
            landed("world", near, 80)
        );
        assert_eq!(
            scene.call_from_pod(APP, far, 80),
            landed("outbound", far, 80)
        );
    }
}

#[test]
fn an_interface_is_left_alone_both_ways() {
    if !can_run() {
        return;
    }
    let scene = scene(&json!({"excludeInterfaces": ["eth0"]}));
    for family in BOTH {
        let (pod, world) = (POD[family], WORLD[family]);
        assert_eq!(scene.call_from_world(pod, 8080), landed("app", pod, 8080));
        assert_eq!(
            scene.call_from_pod(APP, world, 80),
            landed("world", world, 80)
        );
    }
}

#[test]
fn without_ipv6_its_rules_are_left_out_and_ipv4_works() {
    if !can_run() {
        return;
    }
    let scene = Scene::with_families(&[0]);
    let argument = argument(&json!({"excludeOutboundIPRanges": ["2001:db8::/32"]}));
    init(&scene.pod, &[&argument]).must(0, "IPv6 is not there; its rules are left out");
    init(&scene.pod, &["--check", &argument]).must(0, "IPv4 checked");
    assert!(!listed(&scene.pod).contains("ip6"));
    assert_eq!(
        scene.call_from_world(POD[0], 8080),
        landed("inbound", POD[0], 8080)
    );
    assert_eq!(
        scene.call_from_pod(APP, FAR[0], 80),
        landed("outbound", FAR[0], 80)
    );
}

#[test]
fn a_pod_with_ipv6_only_is_redirected() {
    if !can_run() {
        return;
    }
    let scene = Scene::with_families(&[1]);
    init(&scene.pod, &[&argument(&json!({}))]).must(0, "IPv6 redirected");
    assert_eq!(
        scene.call_from_world(POD[1], 8080),
        landed("inbound", POD[1], 8080)
    );
    assert_eq!(
        scene.call_from_pod(APP, FAR[1], 80),
        landed("outbound", FAR[1], 80)
    );
}

#[test]
fn running_again_changes_nothing_and_other_settings_replace_it() {
    if !can_run() {
        return;
    }
    let namespace = Namespace::new();
    // Somebody else's rules are not ours to touch.
    namespace.run("nft add table inet other && nft add table ip malha");
    let (plain, other) = (
        argument(&json!({})),
        argument(&json!({"excludeOutboundPorts": [25]})),
    );
    init(&namespace, &[&plain]).must(0, "");
    let once = namespace.run("nft list ruleset");
    init(&namespace, &[&plain]).must(0, "");
    assert_eq!(namespace.run("nft list ruleset"), once);
    init(&namespace, &[&other]).must(0, "");
    let rules = settings(&json!({"excludeOutboundPorts": [25]})).rule_set(Families::BOTH);
    assert_eq!(listed(&namespace), rules.to_string());
    let tables = namespace.run("nft list tables");
    assert!(tables.contains("table inet other") && tables.contains("table ip malha"));
}

#[test]
fn no_connection_slips_through_while_the_rules_are_replaced() {
    if !can_run() {
        return;
    }
    let scene = scene(&json!({}));
    std::thread::scope(|scope| {
        let replacing = scope.spawn(|| {
            for times in 0..20 {
                let port = 1000 + times % 7;
                let changed = argument(&json!({"excludeOutboundPorts": [port]}));
                init(&scene.pod, &[&changed]).must(0, "");
            }
        });
        while !replacing.is_finished() {
            for family in BOTH {
                let (pod, world) = (POD[family], WORLD[family]);
                assert_eq!(scene.call_from_world(pod, 8080).at, "inbound");
                assert_eq!(scene.call_from_pod(APP, world, 80).at, "outbound");
            }
        }
    });
}

#[test]
fn every_change_of_the_rules_is_noticed() {
    if !can_run() {
        return;
    }
    let namespace = Namespace::new();
    let changes = json!({"excludeOutboundPorts": [25], "excludeOutboundIPRanges": ["10.0.0.0/9"]});
    let wanted = argument(&changes);
    let handle = |rule: &str| {
        let command = format!("nft -a list table inet malha | sed -n 's/.*{rule}.*handle //p'");
        let handles = namespace.run(&command);
        handles.trim().to_owned()
    };
    let absent = init(&namespace, &["--check", &wanted]);
    absent.must(
        1,
        "the redirection is not in force: table inet malha is missing",
    );
    type Case<'a> = (&'a str, &'a dyn Fn() -> String, &'a str);
    let cases: &[Case<'_>] = &[
        (
            "a rule is deleted",
            &|| {
                format!(
                    "delete rule inet malha output handle {}",
                    handle("dport 25")
                )
            },
            "in chain output rule 6 is not `tcp dport 25 return`",
        ),
        (
            "a rule is altered a little",
            &|| {
                let handle = handle("10.0.0.0\\/9");
                format!(
                    "replace rule inet malha output handle {handle} ip daddr 10.0.0.0/10 return"
                )
            },
            "in chain output rule 7 is not `ip daddr 10.0.0.0/9 return`",
        ),
        (
            "a rule redirects elsewhere",
            &|| {
                let handle = handle("redirect to :15006");
                format!(
                    "replace rule inet malha inbound handle {handle} meta l4proto tcp redirect to :15007"
                )
            },
            "in chain inbound rule 3 is not `meta l4proto tcp redirect to :15006`",
        ),
        (
            "a rule does something we never do",
            &|| {
                let handle = handle("dport 25");
                format!(
                    "replace rule inet malha output handle {handle} tcp dport 25 counter return"
                )
            },
            "in chain output rule 6",
        ),
        (
            "a rule goes before the others",
            &|| "insert rule inet malha prerouting accept".to_owned(),
            "in chain prerouting rule 1 is not `meta l4proto != tcp return`",
        ),
        (
            "a rule comes after the others",
            &|| "add rule inet malha output accept".to_owned(),
            "chain output has 9 rules instead of 8",
        ),
        (
            "the table is emptied",
            &|| "flush table inet malha".to_owned(),
            "in chain inbound rule 1",
        ),
        (
            "a chain is added",
            &|| "add chain inet malha extra".to_owned(),
            "chain extra does not belong there",
        ),
        (
            "the table is switched off",
            &|| "add table inet malha { flags dormant; }".to_owned(),
            "table inet malha is dormant",
        ),
        (
            "the policy is another",
            &|| {
                let hook = "type nat hook output priority -100; policy drop;";
                format!("chain inet malha output {{ {hook} }}")
            },
            "chain output is not `type nat hook output priority -100; policy accept;`",
        ),
        (
            "all is deleted",
            &|| "delete table inet malha".to_owned(),
            "table inet malha is missing",
        ),
        (
            "the address is gone",
            &|| "list ruleset' >/dev/null; ip address del ::6/128 dev 'lo".to_owned(),
            "interface lo does not have the address ::6",
        ),
    ];
    for (name, change, words) in cases {
        init(&namespace, &[&wanted]).must(0, "");
        init(&namespace, &["--check", &wanted]).must(0, "IPv4 checked");
        namespace.run(&format!("nft '{}'", change()));
        let noticed = init(&namespace, &["--check", &wanted]);
        assert_eq!(noticed.code, Some(1), "{name}: {}", noticed.said);
        assert!(noticed.said.contains(words), "{name}: {}", noticed.said);
    }
    init(&namespace, &[&wanted]).must(0, "");
    init(&namespace, &["--check", &argument(&json!({}))]).must(1, "in chain output rule 6");
}

#[test]
fn a_user_that_is_not_root_installs_with_the_file_capability_alone() {
    if !can_run() {
        return;
    }
    let namespace = Namespace::new();
    let wanted = argument(&json!({}));
    for capability in ["cap_net_admin+p", "cap_net_admin+ep"] {
        let image = Image::with(Some(capability));
        let ended = image.run(&namespace, Held::NetAdmin, &[&wanted]);
        ended.must(0, "IPv6 redirected: inbound to port 15006");
        let ended = image.run(&namespace, Held::NetAdmin, &["--check", &wanted]);
        ended.must(0, "IPv6 checked");
        assert!(listed(&namespace).contains("redirect to :15006"));
        namespace.run("nft delete table inet malha");
    }
}

#[test]
fn without_the_capability_the_way_out_is_said_and_nothing_is_done() {
    if !can_run() {
        return;
    }
    let namespace = Namespace::new();
    let wanted = argument(&json!({}));
    let plain = Image::with(None);
    plain
        .run(&namespace, Held::NetAdmin, &[&wanted])
        .must(77, "setcap cap_net_admin+p malha-init in the image");
    Image::with(Some("cap_net_admin+p"))
        .run(&namespace, Held::Nothing, &[&wanted])
        .must(77, "add NET_ADMIN to its securityContext.capabilities");
    assert_eq!(namespace.run("nft list ruleset"), "");
    // Why the image has `+p`: with `+ep` it cannot even say so.
    let refused = Image::with(Some("cap_net_admin+ep")).run(&namespace, Held::Nothing, &[&wanted]);
    assert!(!refused.said.contains("malha-init:"), "{}", refused.said);
    assert_ne!(refused.code, Some(0));
}

#[test]
fn a_kernel_without_a_packet_filter_is_told_by_the_feature_that_it_lacks() {
    if !can_run() {
        return;
    }
    let namespace = Namespace::new();
    let wanted = argument(&json!({}));
    for arguments in [&[wanted.as_str()][..], &["--check", &wanted]] {
        without_netfilter(&namespace, arguments).must(
            69,
            "packet filter`: it needs CONFIG_NETFILTER_NETLINK and CONFIG_NF_TABLES",
        );
    }
    assert_eq!(namespace.run("nft list ruleset"), "");
}

#[test]
fn where_a_component_of_the_node_installs_the_rules_the_check_needs_no_capability() {
    if !can_run() {
        return;
    }
    let (wanted, image) = (
        argument(&json!({"excludeOutboundIPRanges": ["192.0.2.0/24"]})),
        Image::with(Some("cap_net_admin+p")),
    );
    let (pod, world) = (Namespace::new(), Namespace::new());
    super::scene::route(&pod, &world);
    let check = || image.run(&pod, Held::Nothing, &["--check", &wanted]);
    check().must(
        1,
        "a connection to 198.51.100.1:9 over IPv4 did not come to the proxy's port",
    );
    // A router that knows no way says so at once, with the error that a pod without a route has from its own kernel.
    world.run(
        "for it in ipv4/ip_forward ipv6/conf/all/forwarding; do echo 1 >/proc/sys/net/$it; done",
    );
    check().must(1, "over IPv4 did not come to the proxy's port");
    init(&pod, &[&wanted]).must(0, "");
    let said = check()
        .must(0, "IPv4: a connection to 198.51.100.1:9 came to port 15001")
        .said;
    assert!(said.contains("IPv6: a connection to [2001:db8::1]:9 came to port 15001"));
    let nothing = argument(&json!({"includeOutboundIPRanges": []}));
    image
        .run(&pod, Held::Nothing, &["--check", &nothing])
        .must(0, "IPv4: not checked, the settings capture nothing");
}

#[test]
fn lists_of_thousands_are_installed_at_once() {
    if !can_run() {
        return;
    }
    let namespace = Namespace::new();
    let ports: Vec<u16> = (1..=3000).map(|port| port * 2).collect();
    let wanted = argument(&json!({"excludeOutboundPorts": ports}));
    init(&namespace, &[&wanted]).must(0, "");
    init(&namespace, &["--check", &wanted]).must(0, "IPv4 checked");
    assert_eq!(listed(&namespace).matches("tcp dport").count(), 3002);
}

#[test]
fn in_a_user_namespace_it_works_as_well() {
    if !can_run() {
        return;
    }
    let wanted = argument(&json!({}));
    let script =
        "ip link set lo up; \"$0\" \"$1\" && \"$0\" --check \"$1\" && nft list table inet malha";
    let output = std::process::Command::new("unshare")
        .args(["-U", "-r", "-n", "sh", "-c", script])
        .args([super::programs::INIT, &wanted])
        .output()
        .expect("unshare starts");
    let said = super::scene::text(&output.stderr);
    if said.contains("unshare failed") {
        return; // This machine allows no user namespaces; the others have shown the rest.
    }
    assert!(output.status.success(), "{said}");
    assert!(super::scene::text(&output.stdout).contains("redirect to :15006"));
}

#[test]
fn wrong_words_and_wrong_settings_have_codes_of_their_own() {
    let run = |arguments: &[&str]| {
        let output = std::process::Command::new(super::programs::INIT)
            .args(arguments)
            .output();
        let output = output.expect("malha-init starts");
        let (out, err) = (&output.stdout, &output.stderr);
        let said = super::scene::text(&[out.as_slice(), err].concat());
        (output.status.code(), said)
    };
    for wrong in [
        &[][..],
        &["--chek", "{}"],
        &["{}", "{}"],
        &["--check"],
        &["-x"],
    ] {
        let (code, said) = run(wrong);
        assert_eq!(code, Some(64), "{said}");
        assert!(said.contains("usage: malha-init"), "{said}");
    }
    let (code, said) = run(&["--check", &argument(&json!({"inboundPort": 0}))]);
    assert_eq!(code, Some(65));
    let words = "because: `inboundPort`: 0 is not possible; a port is a number from 1 to 65535";
    assert!(said.contains(words), "{said}");
    assert_eq!(run(&["--print", &argument(&json!({}))]).0, Some(0));
    assert!(run(&["--help"]).1.contains("Exit codes"));
    assert!(run(&["--version"]).1.starts_with("malha-init 0."));
}
