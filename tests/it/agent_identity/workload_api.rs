//! The Workload API, read by the `spiffe` crate and by hand.

use std::{fs, path::Path};

use hyper_util::rt::TokioIo;
use malha::proto::workload::{
    JwtsvidRequest, X509BundlesRequest, X509svidRequest,
    spiffe_workload_api_client::SpiffeWorkloadApiClient,
};
use spiffe::X509Source;
use tokio::net::UnixStream;
use tonic::{
    Code, Request,
    transport::{Channel, Endpoint},
};
use tower::service_fn;

use super::{
    control_plane::ControlPlane,
    pod::{Pod, mount},
    soon,
};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

#[tokio::test]
async fn a_client_that_nobody_here_wrote_reads_identity_and_bundle_and_sees_a_rotation() {
    let place = tempfile::tempdir().unwrap();
    let plane = ControlPlane::start(place.path());
    let web = Pod::start(place.path(), &plane, "web");
    web.identity().await;
    let endpoint = format!("unix://{}", web.path("workload/socket").display());
    let source = X509Source::builder().endpoint(&endpoint).build();
    let source = soon("the first update", source).await.unwrap();

    let svid = source.svid().unwrap();
    assert_eq!(svid.spiffe_id().to_string(), WEB);
    assert_eq!(svid.cert_chain().len(), 2);
    let mesh = spiffe::TrustDomain::new("cluster.local").unwrap();
    let bundle = source.try_bundle_for_trust_domain(&mesh).unwrap();
    let ours = web.identity().await;
    let roots: Vec<&[u8]> = ours.bundle.certificates().collect();
    let theirs: Vec<&[u8]> = bundle.authorities().iter().map(|c| c.as_bytes()).collect();
    assert_eq!(theirs, roots);

    let leaf = |svid: &spiffe::X509Svid| svid.cert_chain()[0].as_bytes().to_vec();
    let first = leaf(&svid);
    let mut updates = source.updated();
    let new = async {
        while leaf(&source.svid().unwrap()) == first {
            updates.changed().await.unwrap();
        }
    };
    soon("a rotation", new).await;
    assert_eq!(source.svid().unwrap().spiffe_id().to_string(), WEB);
    source.shutdown().await;
    web.end().await;
}

#[tokio::test]
async fn a_call_without_the_header_or_before_there_is_an_identity_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let mut plane = ControlPlane::start(place.path());
    plane.kill();
    let web = Pod::start_with(place.path(), &plane, "web", None);
    let mut client = connect(&web.path("workload/socket")).await;

    let bare = client.fetch_x509svid(Request::new(X509svidRequest {}));
    assert_eq!(bare.await.unwrap_err().code(), Code::InvalidArgument);
    let early = client.fetch_x509svid(marked(X509svidRequest {})).await;
    assert_eq!(early.unwrap_err().code(), Code::PermissionDenied);
    let early = client.fetch_x509_bundles(marked(X509BundlesRequest {}));
    assert_eq!(early.await.unwrap_err().code(), Code::PermissionDenied);
    let tokens = client.fetch_jwtsvid(marked(JwtsvidRequest::default()));
    assert_eq!(tokens.await.unwrap_err().code(), Code::Unimplemented);

    plane.start_again();
    web.identity().await;
    let answers = client.fetch_x509svid(marked(X509svidRequest {})).await;
    let answer = answers.unwrap().into_inner().message().await.unwrap();
    assert_eq!(answer.unwrap().svids[0].spiffe_id, WEB);
    web.end().await;
}

#[tokio::test]
async fn a_bundle_stream_is_told_new_roots_and_not_new_leaves() {
    let place = tempfile::tempdir().unwrap();
    let plane = ControlPlane::start(&place.path().join("ours"));
    let other = ControlPlane::start(&place.path().join("other"));
    let web = Pod::start(place.path(), &plane, "web");
    let first = web.identity().await;
    let mut client = connect(&web.path("workload/socket")).await;
    let answers = client
        .fetch_x509_bundles(marked(X509BundlesRequest {}))
        .await;
    let mut answers = answers.unwrap().into_inner();
    let told = answers.message().await.unwrap().unwrap();
    let one = told.bundles["spiffe://cluster.local"].clone();

    web.renewed_after(&first).await;
    mount(&web.path(""), &(plane.bundle() + &other.bundle()));
    let told = soon("the next bundle", answers.message()).await;
    let two = told.unwrap().unwrap().bundles["spiffe://cluster.local"].clone();
    assert!(
        two.len() > one.len() + 200,
        "{} and {}",
        one.len(),
        two.len()
    );
    web.end().await;
    // the end of the agent ends the stream, and nobody waits for it
    assert!(matches!(answers.message().await, Ok(None) | Err(_)));
}

#[tokio::test]
async fn the_application_reaches_its_socket_and_nobody_but_the_owner_reaches_envoys() {
    use std::os::unix::fs::PermissionsExt;
    let place = tempfile::tempdir().unwrap();
    let mut plane = ControlPlane::start(place.path());
    plane.kill();
    let web = Pod::start_with(place.path(), &plane, "web", None);
    let mode = |name: &str| fs::metadata(web.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("sds.sock"), 0o600);
    assert_eq!(mode("workload/socket"), 0o777);
    web.end().await;
}

async fn connect(socket: &Path) -> SpiffeWorkloadApiClient<Channel> {
    let socket = socket.to_owned();
    let dial = service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://workload");
    SpiffeWorkloadApiClient::new(endpoint.connect_with_connector(dial).await.unwrap())
}

fn marked<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert("workload.spiffe.io", "true".parse().unwrap());
    request
}
