//! A port of a pod, reached through the API server.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use hyper::Request;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, api::Portforwarder};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::{Cluster, PATIENCE, PodName, ask, loopback::exchange};

/// A way that the API server has opened.
pub(in crate::cli) struct Forward {
    /// `port 15016 of pod malha-system/malha-0`.
    to: String,
    port: u16,
    forwarder: Portforwarder,
}

/// Whom to expect at the other end, and whom to believe that it is.
pub(in crate::cli) type TlsServer = (Arc<ClientConfig>, ServerName<'static>);

impl Cluster {
    /// Opens it.
    ///
    /// # Errors
    /// The API server refuses, or does not answer.
    pub(in crate::cli) async fn forward(
        &self,
        pod: &PodName,
        port: u16,
    ) -> anyhow::Result<Forward> {
        let to = format!("port {port} of pod {pod}");
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let forwarder = ask(api.portforward(&pod.name, &[port]))
            .await
            .with_context(|| format!("cannot forward {to}"))?;
        Ok(Forward {
            to,
            port,
            forwarder,
        })
    }
}

impl Forward {
    /// One question: the status and the body. Over TLS where a server is named.
    ///
    /// # Errors
    /// Nobody listens there, it is somebody else, or no answer comes.
    pub(in crate::cli) async fn exchange(
        mut self,
        server: Option<TlsServer>,
        request: Request<Bytes>,
    ) -> anyhow::Result<(u16, Vec<u8>)> {
        let stream = self.forwarder.take_stream(self.port);
        let stream = stream.context("the port-forward has no stream")?;
        let fault = self.forwarder.take_error(self.port);
        let talk = async {
            match server {
                None => exchange(stream, request).await,
                Some((config, name)) => {
                    let stream = TlsConnector::from(config).connect(name, stream).await;
                    exchange(stream.context("no TLS connection")?, request).await
                }
            }
        };
        let answer = timeout(PATIENCE, talk).await;
        let answer = answer.unwrap_or_else(|_| Err(anyhow!("no answer within {PATIENCE:?}")));
        self.forwarder.abort();
        // The kubelet's words ("connection refused") say more than an end of the stream.
        let told = match (&answer, fault) {
            (Err(_), Some(fault)) => timeout(Duration::from_millis(200), fault).await.ok(),
            _ => None,
        };
        match told.flatten() {
            Some(told) => Err(anyhow!("{}: {}", self.to, told.trim())),
            None => answer.with_context(|| self.to),
        }
    }
}
