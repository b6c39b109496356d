//! Reads the argument of `malha-init`. The format is the one that [`Redirection`] is written in; a test reads back all
//! that can be written.

use std::fmt::Display;

use serde_json::{Map, Value};

use super::{Redirection, values::Include};

/// Why an argument is no capture settings.
#[derive(Debug, thiserror::Error)]
pub enum ArgumentError {
    /// No JSON.
    #[error("the capture settings are not JSON; pass what the injector wrote, unchanged")]
    Json(#[source] serde_json::Error),
    /// JSON of another shape.
    #[error("the capture settings must be one JSON object like {{\"proxyGid\":1337,…}}")]
    NoObject,
    /// A key is not there.
    #[error("`{0}` is missing; do injector and malha-init have the same version?")]
    Missing(&'static str),
    /// A key that means nothing here.
    #[error("`{0}` is unknown; do injector and malha-init have the same version?")]
    Unknown(String),
    /// A value that cannot be.
    #[error("`{key}`: {value} is not possible; {allowed}")]
    Value {
        /// Where it stands.
        key: &'static str,
        /// The JSON of it.
        value: String,
        /// What may stand there.
        allowed: String,
    },
}

pub(super) fn parse(argument: &str) -> Result<Redirection, ArgumentError> {
    let document: Value = serde_json::from_str(argument).map_err(ArgumentError::Json)?;
    let Value::Object(object) = document else {
        return Err(ArgumentError::NoObject);
    };
    let mut keys = Keys(object);
    let settings = Redirection {
        proxy_gid: keys.one("proxyGid", id)?,
        inbound_port: keys.one("inboundPort", port)?,
        outbound_port: keys.one("outboundPort", port)?,
        include_inbound_ports: keys.all_or_list("includeInboundPorts", port)?,
        exclude_inbound_ports: keys.list("excludeInboundPorts", port)?,
        include_outbound_ports: keys.all_or_list("includeOutboundPorts", port)?,
        exclude_outbound_ports: keys.list("excludeOutboundPorts", port)?,
        include_outbound_ip_ranges: keys.all_or_list("includeOutboundIPRanges", text)?,
        exclude_outbound_ip_ranges: keys.list("excludeOutboundIPRanges", text)?,
        exclude_interfaces: keys.list("excludeInterfaces", text)?,
        exclude_outbound_uids: keys.list("excludeOutboundUids", id)?,
    };
    if let Some(key) = keys.0.into_iter().next().map(|(key, _)| key) {
        return Err(ArgumentError::Unknown(key));
    }
    if settings.inbound_port == settings.outbound_port {
        let value = Value::from(settings.outbound_port);
        let allowed = "the proxy cannot tell what enters from what leaves on one port";
        return Err(wrong("outboundPort", &value, allowed));
    }
    Ok(settings)
}

/// The keys that nobody has read yet.
struct Keys(Map<String, Value>);

/// Reads one item, or says what it should be.
type Read<T> = fn(&Value) -> Result<T, String>;

impl Keys {
    fn take(&mut self, key: &'static str) -> Result<Value, ArgumentError> {
        self.0.remove(key).ok_or(ArgumentError::Missing(key))
    }

    fn one<T>(&mut self, key: &'static str, read: Read<T>) -> Result<T, ArgumentError> {
        let value = self.take(key)?;
        read(&value).map_err(|allowed| wrong(key, &value, allowed))
    }

    fn list<T>(&mut self, key: &'static str, read: Read<T>) -> Result<Vec<T>, ArgumentError> {
        items(key, &self.take(key)?, read)
    }

    fn all_or_list<T>(
        &mut self,
        key: &'static str,
        read: Read<T>,
    ) -> Result<Include<T>, ArgumentError> {
        match self.take(key)? {
            Value::String(star) if star == "*" => Ok(Include::All),
            value => items(key, &value, read).map(Include::Only),
        }
    }
}

fn items<T>(key: &'static str, value: &Value, read: Read<T>) -> Result<Vec<T>, ArgumentError> {
    let Value::Array(items) = value else {
        return Err(wrong(key, value, "a list is expected"));
    };
    let one = |item| read(item).map_err(|allowed| wrong(key, item, allowed));
    items.iter().map(one).collect()
}

fn wrong(key: &'static str, value: &Value, allowed: impl Display) -> ArgumentError {
    let (value, allowed) = (value.to_string(), allowed.to_string());
    ArgumentError::Value {
        key,
        value,
        allowed,
    }
}

fn port(value: &Value) -> Result<u16, String> {
    let port = value.as_u64().and_then(|port| u16::try_from(port).ok());
    port.filter(|port| *port != 0)
        .ok_or_else(|| "a port is a number from 1 to 65535".to_owned())
}

/// Of a user or a group; the highest number means "none" to the kernel.
fn id(value: &Value) -> Result<u32, String> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.filter(|id| *id != u32::MAX)
        .ok_or_else(|| "an id is a number from 0 to 4294967294".to_owned())
}

fn text<T: std::str::FromStr<Err: Display>>(value: &Value) -> Result<T, String> {
    let text = value.as_str().ok_or("a text is expected")?;
    text.parse().map_err(|error: T::Err| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the injector writes for a pod without annotations.
    const PLAIN: &str = concat!(
        r#"{"proxyGid":1337,"inboundPort":15006,"outboundPort":15001,"includeInboundPorts":"*","#,
        r#""excludeInboundPorts":[15020,15021,15090],"includeOutboundPorts":[],"excludeOutboundPorts":[],"#,
        r#""includeOutboundIPRanges":"*","excludeOutboundIPRanges":[],"excludeInterfaces":[],"excludeOutboundUids":[]}"#,
    );

    fn with(key: &str, value: Value) -> String {
        let mut argument: Value = serde_json::from_str(PLAIN).expect("JSON");
        argument[key] = value;
        argument.to_string()
    }

    #[test]
    fn what_is_read_is_written_again() {
        let settings = Redirection::parse(PLAIN).expect("good settings");
        assert_eq!(settings.exclude_inbound_ports, [15020, 15021, 15090]);
        assert_eq!(settings.to_argument(), PLAIN);
    }

    #[test]
    fn each_key_is_needed() {
        let Value::Object(keys) = serde_json::from_str(PLAIN).expect("JSON") else {
            unreachable!("an object")
        };
        for key in keys.keys() {
            let mut fewer = keys.clone();
            fewer.remove(key);
            let error = Redirection::parse(&Value::Object(fewer).to_string()).expect_err(key);
            assert!(
                error
                    .to_string()
                    .starts_with(&format!("`{key}` is missing")),
                "{error}"
            );
        }
    }

    #[test]
    fn an_error_names_the_key_the_value_and_what_is_allowed() {
        let cases = [
            (
                with("excludeInboundPorts", vec![80, 0].into()),
                "`excludeInboundPorts`: 0 is not possible; a port is a number from 1 to 65535",
            ),
            (
                with("includeInboundPorts", "all".into()),
                "`includeInboundPorts`: \"all\" is not possible; a list is expected",
            ),
            (
                with("inboundPort", 65536.into()),
                "`inboundPort`: 65536 is not possible; a port is a number from 1 to 65535",
            ),
            (
                with("inboundPort", 15001.into()),
                "`outboundPort`: 15001 is not possible; the proxy cannot tell what enters from what leaves on one port",
            ),
            (
                with("excludeOutboundIPRanges", vec!["10.0.0.0/33"].into()),
                "`excludeOutboundIPRanges`: \"10.0.0.0/33\" is not possible; a range is written like 10.0.0.0/8 or 2001:db8::/32",
            ),
            (
                with("excludeInterfaces", vec!["a/b"].into()),
                "`excludeInterfaces`: \"a/b\" is not possible; an interface has a name of 1 to 15 letters, digits and ._-@+:",
            ),
            (
                with("excludeOutboundUids", vec![4_294_967_295_u64].into()),
                "`excludeOutboundUids`: 4294967295 is not possible; an id is a number from 0 to 4294967294",
            ),
            (
                with("proxyGid", "1337".into()),
                "`proxyGid`: \"1337\" is not possible; an id is a number from 0 to 4294967294",
            ),
            (
                with("excludePorts", vec![1].into()),
                "`excludePorts` is unknown; do injector and malha-init have the same version?",
            ),
            (
                "[]".to_owned(),
                "the capture settings must be one JSON object like {\"proxyGid\":1337,…}",
            ),
        ];
        for (argument, want) in cases {
            let error = Redirection::parse(&argument).expect_err(want);
            assert_eq!(error.to_string(), want);
        }
        assert!(matches!(
            Redirection::parse("{"),
            Err(ArgumentError::Json(_))
        ));
    }
}
