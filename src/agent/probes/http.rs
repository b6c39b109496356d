//! `httpGet`, with the kubelet's headers and its way with redirects.

use std::net::{IpAddr, SocketAddr};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::{
    HeaderMap, Request, Uri,
    header::{
        ACCEPT, CONNECTION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, LOCATION, USER_AGENT,
    },
};
use rustls_pki_types::ServerName;
use tokio_rustls::TlsConnector;

use super::{Answer, Asker, BODY_LIMIT, HttpGet, ProbeError, Scheme, dial, tls};
use crate::agent::client::{self, Exchange};

/// Go's client gives up at this one.
const REDIRECTS: usize = 10;

/// Asks, and follows redirects to the pod itself. One to another host passes, as it does with the kubelet.
pub(super) async fn get(pod: IpAddr, get: &HttpGet, asker: &Asker) -> Result<Answer, ProbeError> {
    let mut target = Target {
        scheme: get.scheme,
        port: get.port,
        path: escaped(&get.path),
    };
    let (headers, mut host) = headers(get, asker)?;
    for _ in 0..REDIRECTS {
        let exchange = ask(pod, &target, &headers, host.as_deref()).await?;
        match target.redirected(pod, &exchange) {
            None => return Ok(answer(exchange).await),
            Some(Redirect::Elsewhere) => return Ok(Answer::ok("redirected to another host")),
            Some(Redirect::Here(next, names_the_host)) => {
                if names_the_host {
                    host = None;
                }
                target = next;
            }
        }
    }
    Err(ProbeError::Redirects)
}

/// Where one request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    scheme: Scheme,
    port: u16,
    path: String,
}

#[derive(Debug, PartialEq, Eq)]
enum Redirect {
    /// To the pod; whether by its whole address.
    Here(Target, bool),
    Elsewhere,
}

impl Target {
    fn redirected(&self, pod: IpAddr, exchange: &Exchange) -> Option<Redirect> {
        let status = exchange.response.status().as_u16();
        if !matches!(status, 301 | 302 | 303 | 307 | 308) {
            return None;
        }
        let location = exchange.response.headers().get(LOCATION)?;
        self.follow(pod, location.to_str().ok()?)
    }

    /// RFC 3986 5.2, as far as servers use it: whole URLs, `//host/..`, `/path`, and paths beside this one.
    fn follow(&self, pod: IpAddr, location: &str) -> Option<Redirect> {
        let location = location.split('#').next().unwrap_or_default();
        let whole = match location.strip_prefix("//") {
            Some(rest) => format!("{}://{rest}", self.scheme.as_str()),
            None => location.to_owned(),
        };
        if !whole.contains("://") {
            let path = match whole.as_str() {
                "" => self.path.clone(),
                path if path.starts_with('/') => path.to_owned(),
                query if query.starts_with('?') => format!("{}{query}", self.bare_path()),
                beside => {
                    let base = self.bare_path();
                    let directory = base.rfind('/').map_or("/", |at| &base[..=at]);
                    format!("{directory}{beside}")
                }
            };
            let next = Self {
                path: escaped(&path),
                ..self.clone()
            };
            return Some(Redirect::Here(next, false));
        }
        let uri: Uri = escaped_url(&whole).parse().ok()?;
        let scheme = match uri.scheme_str()? {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            _ => return Some(Redirect::Elsewhere),
        };
        let bare = uri.host()?.trim_start_matches('[').trim_end_matches(']');
        if bare.parse::<IpAddr>() != Ok(pod) {
            return Some(Redirect::Elsewhere);
        }
        let next = Self {
            scheme,
            port: uri.port_u16().unwrap_or_else(|| scheme.default_port()),
            path: uri
                .path_and_query()
                .map_or_else(|| "/".to_owned(), ToString::to_string),
        };
        Some(Redirect::Here(next, true))
    }

    fn bare_path(&self) -> &str {
        self.path.split('?').next().unwrap_or_default()
    }
}

impl Scheme {
    fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// The author's headers, those that the kubelet adds where the author has none, and the author's `Host`.
fn headers(get: &HttpGet, asker: &Asker) -> Result<(HeaderMap, Option<String>), ProbeError> {
    let mut headers = HeaderMap::new();
    let mut host = None;
    for header in &get.headers {
        let unaskable = || ProbeError::Unaskable(format!("header {:?}", header.name));
        let name: HeaderName = header.name.parse().map_err(|_| unaskable())?;
        if name == HOST {
            host = Some(header.value.clone()).filter(|host| !host.is_empty());
            continue;
        }
        let value = HeaderValue::from_str(&header.value).map_err(|_| unaskable())?;
        headers.append(name, value);
    }
    // An empty value of the author's takes these away, as the kubelet does it.
    let user_agent = asker.user_agent.as_deref().unwrap_or("kube-probe/malha");
    for (name, value) in [(USER_AGENT, user_agent), (ACCEPT, "*/*")] {
        match headers.get(&name) {
            Some(own) if own.is_empty() => drop(headers.remove(name)),
            Some(_) => {}
            None => {
                if let Ok(value) = HeaderValue::from_str(value) {
                    headers.insert(name, value);
                }
            }
        }
    }
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    Ok((headers, host))
}

async fn ask(
    pod: IpAddr,
    target: &Target,
    headers: &HeaderMap,
    host: Option<&str>,
) -> Result<Exchange, ProbeError> {
    let at = SocketAddr::new(pod, target.port);
    let authority = host.map_or_else(|| at.to_string(), str::to_owned);
    let mut request = Request::get(&target.path)
        .header(HOST, authority)
        .body(Empty::<Bytes>::new())
        .map_err(|_| ProbeError::Unaskable(format!("path {:?}", target.path)))?;
    for (name, value) in headers {
        request.headers_mut().append(name, value.clone());
    }
    let stream = dial(pod, target.port).await?;
    let exchange = match target.scheme {
        Scheme::Http => client::send(stream, request).await,
        Scheme::Https => {
            let connector = TlsConnector::from(tls::unverified());
            let tls = connector
                .connect(ServerName::IpAddress(pod.into()), stream)
                .await
                .map_err(|source| ProbeError::Handshake { at, source })?;
            client::send(tls, request).await
        }
    };
    exchange.map_err(|source| ProbeError::Broken { at, source })
}

async fn answer(exchange: Exchange) -> Answer {
    let content_type = exchange.response.headers().get(CONTENT_TYPE);
    let content_type = content_type.and_then(|it| it.to_str().ok().map(str::to_owned));
    Answer {
        status: exchange.response.status().as_u16(),
        content_type,
        body: exchange.beginning(BODY_LIMIT).await,
    }
}

/// A path as it may stand in a request: begins with `/`, without fragment, odd bytes percent-encoded as Go does it.
pub(in crate::agent) fn escaped(path: &str) -> String {
    let path = path.split('#').next().unwrap_or_default();
    let mut out = String::with_capacity(path.len() + 1);
    if !path.starts_with('/') {
        out.push('/');
    }
    escape_into(path, &mut out);
    out
}

fn escaped_url(url: &str) -> String {
    let mut out = String::with_capacity(url.len());
    escape_into(url, &mut out);
    out
}

fn escape_into(text: &str, out: &mut String) {
    use std::fmt::Write;
    for byte in text.bytes() {
        match byte {
            b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}' | 0..=b' ' | 0x7f.. => {
                write!(out, "%{byte:02X}").expect("a string takes everything");
            }
            byte => out.push(char::from(byte)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_is_followed_to_the_pod_and_nowhere_else() {
        let pod: IpAddr = "10.0.0.7".parse().expect("an address");
        let from = Target {
            scheme: Scheme::Http,
            port: 8080,
            path: "/a/b?x=1".to_owned(),
        };
        let here = |scheme, port, path: &str, whole| {
            Some(Redirect::Here(
                Target {
                    scheme,
                    port,
                    path: path.to_owned(),
                },
                whole,
            ))
        };
        let cases = [
            ("/ready", here(Scheme::Http, 8080, "/ready", false)),
            ("c", here(Scheme::Http, 8080, "/a/c", false)),
            ("?y=2", here(Scheme::Http, 8080, "/a/b?y=2", false)),
            ("/ready#top", here(Scheme::Http, 8080, "/ready", false)),
            (
                "https://10.0.0.7:8443/x",
                here(Scheme::Https, 8443, "/x", true),
            ),
            ("https://10.0.0.7/x", here(Scheme::Https, 443, "/x", true)),
            ("//10.0.0.7:81", here(Scheme::Http, 81, "/", true)),
            ("https://login.example/x", Some(Redirect::Elsewhere)),
            ("http://10.0.0.8:8080/", Some(Redirect::Elsewhere)),
            ("ftp://10.0.0.7/", Some(Redirect::Elsewhere)),
        ];
        for (location, want) in cases {
            assert_eq!(from.follow(pod, location), want, "{location}");
        }
    }

    #[test]
    fn odd_paths_become_requests() {
        for (path, want) in [
            ("", "/"),
            ("health", "/health"),
            ("/a b/ü?q={1}#f", "/a%20b/%C3%BC?q=%7B1%7D"),
            ("/%2F", "/%2F"),
        ] {
            assert_eq!(escaped(path), want);
        }
    }
}
