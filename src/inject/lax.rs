//! Reading JSON that nobody has validated: whatever stands in a field, the fields beside it are still read.
//!
//! A webhook sees a pod before the API server has validated it, so a list may be null and a port a string. Each
//! field is read into a [`Slot`]; only text that is no JSON, or a key that we read and that stands there twice, makes
//! the whole unreadable. Strings are borrowed where they hold no escapes.

use std::{borrow::Cow, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

/// What stands in a field.
#[derive(Debug, Clone, Default)]
pub(super) enum Slot<T> {
    /// Nothing, or null, which Kubernetes reads alike.
    #[default]
    Missing,
    /// Something of another type.
    Odd,
    /// What was expected.
    Present(T),
}

impl<T> Slot<T> {
    pub(super) fn present(&self) -> Option<&T> {
        match self {
            Self::Present(value) => Some(value),
            Self::Missing | Self::Odd => None,
        }
    }

    pub(super) fn into_present(self) -> Option<T> {
        match self {
            Self::Present(value) => Some(value),
            Self::Missing | Self::Odd => None,
        }
    }

    pub(super) fn is_odd(&self) -> bool {
        matches!(self, Self::Odd)
    }

    pub(super) fn is_missing(&self) -> bool {
        matches!(self, Self::Missing)
    }
}

impl<T> Slot<Vec<T>> {
    /// The items; none if there is no list.
    pub(super) fn items(&self) -> &[T] {
        self.present().map_or(&[], Vec::as_slice)
    }
}

impl Slot<Cow<'_, str>> {
    pub(super) fn text(&self) -> Option<&str> {
        self.present().map(AsRef::as_ref)
    }
}

/// A type that one kind of JSON value becomes; `None` says that the value is of another kind.
pub(super) trait Lax<'de>: Sized {
    fn text(_: Cow<'de, str>) -> Option<Self> {
        None
    }
    fn integer(_: i64) -> Option<Self> {
        None
    }
    fn boolean(_: bool) -> Option<Self> {
        None
    }
    fn list<A: SeqAccess<'de>>(mut items: A) -> Result<Option<Self>, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }
    fn object<A: MapAccess<'de>>(mut entries: A) -> Result<Option<Self>, A::Error> {
        while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
    }
}

impl<'de, T: Lax<'de>> Deserialize<'de> for Slot<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyKind(PhantomData))
    }
}

struct AnyKind<T>(PhantomData<T>);

impl<'de, T: Lax<'de>> Visitor<'de> for AnyKind<T> {
    type Value = Slot<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }
    fn visit_unit<E: Error>(self) -> Result<Slot<T>, E> {
        Ok(Slot::Missing)
    }
    fn visit_bool<E: Error>(self, value: bool) -> Result<Slot<T>, E> {
        Ok(of_kind(T::boolean(value)))
    }
    fn visit_i64<E: Error>(self, value: i64) -> Result<Slot<T>, E> {
        Ok(of_kind(T::integer(value)))
    }
    fn visit_u64<E: Error>(self, value: u64) -> Result<Slot<T>, E> {
        Ok(of_kind(i64::try_from(value).ok().and_then(T::integer)))
    }
    fn visit_f64<E: Error>(self, _: f64) -> Result<Slot<T>, E> {
        Ok(Slot::Odd)
    }
    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Slot<T>, E> {
        Ok(of_kind(T::text(Cow::Borrowed(text))))
    }
    fn visit_str<E: Error>(self, text: &str) -> Result<Slot<T>, E> {
        Ok(of_kind(T::text(Cow::Owned(text.to_owned()))))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Slot<T>, A::Error> {
        T::list(items).map(of_kind)
    }
    fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<Slot<T>, A::Error> {
        T::object(entries).map(of_kind)
    }
}

fn of_kind<T>(value: Option<T>) -> Slot<T> {
    value.map_or(Slot::Odd, Slot::Present)
}

/// A string.
pub(super) type Text<'a> = Cow<'a, str>;

impl<'de> Lax<'de> for Text<'de> {
    fn text(text: Self) -> Option<Self> {
        Some(text)
    }
}

impl Lax<'_> for i64 {
    fn integer(value: i64) -> Option<Self> {
        Some(value)
    }
}

impl Lax<'_> for bool {
    fn boolean(value: bool) -> Option<Self> {
        Some(value)
    }
}

/// Items of a list that is read; a longer one is odd. Two bytes of text (`0,`) become hundreds in memory, so that a body of
/// 6 MiB could fill a gigabyte; no pod that etcd would store has so many of anything.
const LONGEST_LIST: usize = 16 * 1024;

impl<'de, T: Lax<'de>> Lax<'de> for Vec<Slot<T>> {
    fn list<A: SeqAccess<'de>>(mut items: A) -> Result<Option<Self>, A::Error> {
        let mut read = Self::new();
        while read.len() <= LONGEST_LIST {
            match items.next_element()? {
                Some(item) => read.push(item),
                None => return Ok(Some(read)),
            }
        }
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }
}

/// Any value, as its text; null is [`Slot::Missing`] only where a [`Table`] or `reads!` asks for it by key.
#[derive(Debug, Clone, Copy)]
pub(super) struct Raw<'a>(pub(super) &'a RawValue);

impl<'a> Raw<'a> {
    /// Reads the value again, more closely.
    pub(super) fn read<T: Lax<'a>>(self) -> Slot<T> {
        serde_json::from_str(self.0.get()).unwrap_or(Slot::Odd)
    }

    pub(super) fn is_null(self) -> bool {
        self.0.get() == "null"
    }
}

/// A value that was checked when it came by, and is read again where it is looked at: it takes the room of a pointer
/// meanwhile, however many there are.
#[derive(Debug, Clone)]
pub(super) struct Lazy<'a, T> {
    raw: Option<Raw<'a>>,
    kind: PhantomData<T>,
}

impl<T> Default for Lazy<'_, T> {
    fn default() -> Self {
        Self {
            raw: None,
            kind: PhantomData,
        }
    }
}

impl<'a, T: Lax<'a>> Lazy<'a, T> {
    pub(super) fn read(&self) -> Slot<T> {
        self.raw.map_or(Slot::Missing, Raw::read)
    }
}

impl<'a, T: Lax<'a>> Deserialize<'a> for Lazy<'a, T> {
    fn deserialize<D: Deserializer<'a>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = <&'a RawValue>::deserialize(deserializer)?;
        let checked: Result<Slot<T>, _> = serde_json::from_str(raw.get());
        checked.map_err(D::Error::custom)?;
        Ok(Self {
            raw: Some(Raw(raw)),
            kind: PhantomData,
        })
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Raw<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        <&RawValue>::deserialize(deserializer).map(Self)
    }
}

/// An object by key, whatever its keys are; nulls are left out.
#[derive(Debug, Clone)]
pub(super) struct Table<'a, T> {
    /// Sorted by key.
    entries: Vec<(Text<'a>, T)>,
}

impl<T> Default for Table<'_, T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
        }
    }
}

impl<'a, T> Table<'a, T> {
    pub(super) fn find(&self, key: &str) -> Option<&T> {
        let at = self
            .entries
            .binary_search_by(|(k, _)| k.as_ref().cmp(key))
            .ok()?;
        self.entries.get(at).map(|(_, value)| value)
    }

    pub(super) fn contains(&self, key: &str) -> bool {
        self.find(key).is_some()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.entries
            .iter()
            .map(|(key, value)| (key.as_ref(), value))
    }

    pub(super) fn map<U>(self, change: impl Fn(T) -> U) -> Table<'a, U> {
        let entries = self.entries.into_iter();
        Table {
            entries: entries.map(|(key, value)| (key, change(value))).collect(),
        }
    }

    fn sorted<E: Error>(mut entries: Vec<(Text<'a>, T)>) -> Result<Self, E> {
        entries.sort_by(|(a, _), (b, _)| a.cmp(b));
        match entries
            .windows(2)
            .find(|pair| matches!(pair, [a, b] if a.0 == b.0))
        {
            Some(pair) => Err(twice(pair.first().map_or("", |(key, _)| key.as_ref()))),
            None => Ok(Self { entries }),
        }
    }
}

/// The error of a key that stands in an object twice: readers disagree about which one counts.
pub(super) fn twice<E: Error>(key: &str) -> E {
    E::custom(format_args!("duplicate key `{}`", key.escape_debug()))
}

/// Labels and annotations.
impl<'de> Lax<'de> for Table<'de, Slot<Text<'de>>> {
    fn object<A: MapAccess<'de>>(mut entries: A) -> Result<Option<Self>, A::Error> {
        let mut read = Vec::new();
        while let Some(key) = entries.next_key::<Slot<Text<'de>>>()? {
            let value: Slot<Text<'de>> = entries.next_value()?;
            if let Slot::Present(key) = key {
                read.push((key, value));
            }
        }
        Self::sorted(read).map(Some)
    }
}

/// An object whose values are looked at one by one.
pub(super) type Fields<'a> = Table<'a, Raw<'a>>;

impl<'de> Lax<'de> for Fields<'de> {
    fn object<A: MapAccess<'de>>(mut entries: A) -> Result<Option<Self>, A::Error> {
        let mut read = Vec::new();
        while let Some(key) = entries.next_key::<Slot<Text<'de>>>()? {
            let value: Raw<'de> = entries.next_value()?;
            match key {
                Slot::Present(key) if !value.is_null() => read.push((key, value)),
                _ => {}
            }
        }
        Self::sorted(read).map(Some)
    }
}

impl<'a> Fields<'a> {
    pub(super) fn read<T: Lax<'a>>(&self, key: &str) -> Slot<T> {
        self.find(key).map_or(Slot::Missing, |raw| raw.read())
    }
}

/// Writes a value in its one canonical form: keys sorted, nulls left out, no spaces, `$` escaped.
///
/// Sorted and without nulls, so that equal pods get equal bytes. `$` as `\u0024`, because the kubelet expands
/// `$(NAME)` in the environment values and arguments that such text becomes.
///
/// No handler of a pod is nested deeper than its headers; what is stays as it was written.
pub(super) fn write_canonical(raw: Raw<'_>, out: &mut String) {
    write_canonical_to_depth(raw, 8, out);
}

fn write_canonical_to_depth(raw: Raw<'_>, depth: u8, out: &mut String) {
    let Some(depth) = depth.checked_sub(1) else {
        out.push_str(raw.0.get());
        return;
    };
    let text = raw.0.get();
    match text.as_bytes().first() {
        Some(b'{') => match raw.read::<Fields<'_>>() {
            Slot::Present(fields) => {
                write_object(fields.iter().map(|(key, raw)| (key, *raw)), depth, out)
            }
            _ => out.push_str(text), // a key stands there twice: left as it is
        },
        Some(b'[') => {
            let items: Vec<Raw<'_>> = serde_json::from_str(text).unwrap_or_default();
            out.push('[');
            for (at, item) in items.into_iter().enumerate() {
                if at > 0 {
                    out.push(',');
                }
                write_canonical_to_depth(item, depth, out);
            }
            out.push(']');
        }
        Some(b'"') => match raw.read::<Text<'_>>() {
            Slot::Present(text) => write_text_unexpanded(&text, out),
            _ => out.push_str("\"\""),
        },
        _ => out.push_str(text),
    }
}

fn write_object<'r>(fields: impl Iterator<Item = (&'r str, Raw<'r>)>, depth: u8, out: &mut String) {
    out.push('{');
    for (at, (key, value)) in fields.enumerate() {
        if at > 0 {
            out.push(',');
        }
        write_text_unexpanded(key, out);
        out.push(':');
        write_canonical_to_depth(value, depth, out);
    }
    out.push('}');
}

/// Writes a JSON string.
pub(super) fn write_text(text: &str, out: &mut String) {
    if is_plain(text) {
        out.push('"');
        out.push_str(text);
        out.push('"');
    } else {
        out.push_str(&serde_json::to_string(text).expect("a string always serialises"));
    }
}

/// Nothing in the text needs an escape in JSON (RFC 8259 section 7).
pub(super) fn is_plain(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte >= b' ' && byte != b'"' && byte != b'\\')
}

/// Writes a JSON string that `$(NAME)` expansion leaves alone.
pub(super) fn write_text_unexpanded(text: &str, out: &mut String) {
    let start = out.len();
    write_text(text, out);
    if text.contains('$') {
        let escaped = out.split_off(start).replace('$', "\\u0024");
        out.push_str(&escaped);
    }
}

/// Declares an object of which a few keys are read.
macro_rules! reads {
    ($($(#[$doc:meta])* struct $name:ident { $($key:literal => $field:ident: $kind:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Default, Clone)]
        pub(super) struct $name<'a> {
            $(pub(super) $field: $kind,)*
            _text: std::marker::PhantomData<&'a ()>,
        }

        impl<'a> $crate::inject::lax::Lax<'a> for $name<'a> {
            fn object<A: serde::de::MapAccess<'a>>(mut entries: A) -> Result<Option<Self>, A::Error> {
                $(let mut $field: Option<$kind> = None;)*
                while let Some(key) = entries.next_key::<Slot<Text<'a>>>()? {
                    match key.text() {
                        $(Some($key) => {
                            if $field.replace(entries.next_value()?).is_some() {
                                return Err($crate::inject::lax::twice($key));
                            }
                        })*
                        _ => {
                            entries.next_value::<serde::de::IgnoredAny>()?;
                        }
                    }
                }
                Ok(Some(Self {
                    $($field: $field.unwrap_or_default(),)*
                    _text: std::marker::PhantomData,
                }))
            }
        }
    )*};
}
pub(super) use reads;
