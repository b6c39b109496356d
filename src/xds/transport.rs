//! Transport sockets: mutual TLS with the pod's own certificate, or plain.
//!
//! Both versions are set to 1.3 on either side: a client's maximum is 1.2 by default, so that the minimum alone fails
//! every handshake (`xds.md` 3.3.3).

use std::collections::BTreeSet;

use envoy_types::pb::envoy::{
    config::core::v3::TransportSocket,
    extensions::transport_sockets::{
        raw_buffer::v3::RawBuffer,
        tls::v3::{
            CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig,
            SubjectAltNameMatcher, TlsParameters, UpstreamTlsContext,
            common_tls_context::{CombinedCertificateValidationContext, ValidationContextType},
            downstream_tls_context::SessionTicketKeysType,
            subject_alt_name_matcher::SanType,
            tls_parameters::TlsProtocol,
        },
    },
    r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern},
};

use super::wire::{boolean, from_agent, number, socket};
use crate::identity::{SpiffeId, TrustDomain};

/// The application protocols by which a mesh proxy says that it speaks mutual TLS. They are Istio's, so that both kinds
/// of sidecar talk during a migration.
pub(super) const MESH_ALPN: [&str; 5] = [
    "istio",
    "istio-peer-exchange",
    "istio-http/1.0",
    "istio-http/1.1",
    "istio-h2",
];

pub(super) fn raw() -> TransportSocket {
    socket("envoy.transport_sockets.raw_buffer", &RawBuffer {})
}

/// A client that takes these identities for its server, and no other.
pub(super) fn client(servers: &BTreeSet<SpiffeId>, sni: &str, alpn: &[&str]) -> TransportSocket {
    let exact = |id: &SpiffeId| MatchPattern::Exact(id.to_string());
    let mut servers: Vec<_> = servers.iter().map(exact).collect();
    if servers.is_empty() {
        // To Envoy an empty list is everybody; this is nobody's identity.
        servers.push(MatchPattern::Exact("spiffe://".to_owned()));
    }
    let context = UpstreamTlsContext {
        common_tls_context: Some(common(servers, alpn)),
        sni: sni.to_owned(),
        // A resumed session would skip the look at the certificate.
        max_session_keys: number(0),
        ..UpstreamTlsContext::default()
    };
    socket("envoy.transport_sockets.tls", &context)
}

/// A server that takes every workload of its trust domain for a client.
pub(super) fn server(trust_domain: &TrustDomain) -> TransportSocket {
    let clients = MatchPattern::Prefix(format!("{}/", trust_domain.uri()));
    let context = DownstreamTlsContext {
        // What a client offers is Istio's names; of these only the plain ones are taken, and where there are none the
        // codec looks at the first bytes.
        common_tls_context: Some(common(vec![clients], &["h2", "http/1.1"])),
        require_client_certificate: boolean(true),
        disable_stateful_session_resumption: true,
        session_ticket_keys_type: Some(SessionTicketKeysType::DisableStatelessSessionResumption(
            true,
        )),
        ..DownstreamTlsContext::default()
    };
    socket("envoy.transport_sockets.tls", &context)
}

fn common(peers: Vec<MatchPattern>, alpn: &[&str]) -> CommonTlsContext {
    let secret = |name: &str| SdsSecretConfig {
        name: name.to_owned(),
        sds_config: Some(from_agent()),
    };
    let peer = |pattern| SubjectAltNameMatcher {
        san_type: SanType::Uri.into(),
        matcher: Some(StringMatcher {
            match_pattern: Some(pattern),
            ..StringMatcher::default()
        }),
        ..SubjectAltNameMatcher::default()
    };
    let context = CertificateValidationContext {
        match_typed_subject_alt_names: peers.into_iter().map(peer).collect(),
        ..CertificateValidationContext::default()
    };
    let combined = CombinedCertificateValidationContext {
        default_validation_context: Some(context),
        validation_context_sds_secret_config: Some(secret("ROOTCA")),
        ..CombinedCertificateValidationContext::default()
    };
    CommonTlsContext {
        tls_params: Some(TlsParameters {
            tls_minimum_protocol_version: TlsProtocol::TlSv13.into(),
            tls_maximum_protocol_version: TlsProtocol::TlSv13.into(),
            ..TlsParameters::default()
        }),
        tls_certificate_sds_secret_configs: vec![secret("default")],
        alpn_protocols: alpn.iter().map(|&name| name.to_owned()).collect(),
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(combined)),
        ..CommonTlsContext::default()
    }
}
