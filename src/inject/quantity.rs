//! Kubernetes quantities (`resource.Quantity`): `100m`, `1.5Gi`, `1e3`, compared and added exactly.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A quantity as its author wrote it, and its value in billionths.
///
/// Billionths, because `n` is the smallest suffix; finer values are rounded up, as Kubernetes does. An `i128` holds
/// more than 10^11 `E`, a hundred billion times what any node has.
#[derive(Clone, Debug)]
pub struct Quantity {
    text: Box<str>,
    nanos: i128,
    form: Form,
}

/// How a quantity is written, so that a sum reads like its first operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Powers of 1024.
    Binary,
    /// Powers of ten.
    Decimal,
}

const ONE: i128 = 1_000_000_000;

/// Suffixes of powers of 1024, the largest first.
const BINARY: [(&str, u32); 6] = [
    ("Ei", 60),
    ("Pi", 50),
    ("Ti", 40),
    ("Gi", 30),
    ("Mi", 20),
    ("Ki", 10),
];
/// Suffixes of powers of ten, the largest first.
const DECIMAL: [(&str, i32); 10] = [
    ("E", 18),
    ("P", 15),
    ("T", 12),
    ("G", 9),
    ("M", 6),
    ("k", 3),
    ("", 0),
    ("m", -3),
    ("u", -6),
    ("n", -9),
];

impl Quantity {
    /// Reads `<signed number><suffix>`; `None` where Kubernetes would refuse it too, or where it is absurdly large.
    pub fn parse(text: &str) -> Option<Self> {
        let end = text
            .find(|c: char| !matches!(c, '0'..='9' | '.' | '+' | '-'))
            .unwrap_or(text.len());
        let (number, suffix) = text.split_at_checked(end)?;
        let (unit, form) = unit(suffix)?;
        Some(Self {
            text: text.into(),
            nanos: scaled(number, unit)?,
            form,
        })
    }

    /// The text as its author wrote it.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Exactly nothing; as a limit: no limit.
    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }

    /// Less than nothing.
    pub fn is_negative(&self) -> bool {
        self.nanos < 0
    }

    /// The sum, written in the form of `self`; `None` if it does not fit.
    pub fn plus(&self, other: &Self) -> Option<Self> {
        let nanos = self.nanos.checked_add(other.nanos)?;
        Some(Self {
            text: written(nanos, self.form).into(),
            nanos,
            form: self.form,
        })
    }
}

/// What one unit of a suffix is worth.
#[derive(Clone, Copy)]
enum Unit {
    TwoTo(u32),
    TenTo(i32),
}

fn unit(suffix: &str) -> Option<(Unit, Form)> {
    if let Some((_, bits)) = BINARY.iter().find(|(name, _)| *name == suffix) {
        return Some((Unit::TwoTo(*bits), Form::Binary));
    }
    if let Some((_, power)) = DECIMAL.iter().find(|(name, _)| *name == suffix) {
        return Some((Unit::TenTo(*power), Form::Decimal));
    }
    let exponent = suffix.strip_prefix(['e', 'E'])?;
    let power: i32 = exponent.parse().ok()?;
    (power.abs() < 1_000).then_some((Unit::TenTo(power), Form::Decimal))
}

/// `[+-]digits[.digits]` times `unit`, in billionths, rounded away from zero.
fn scaled(number: &str, unit: Unit) -> Option<i128> {
    let (negative, digits) = match number.as_bytes().first()? {
        b'-' => (true, number.get(1..)?),
        b'+' => (false, number.get(1..)?),
        _ => (false, number),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let (factor, power) = match unit {
        Unit::TwoTo(bits) => (1_i128 << bits, 9),
        Unit::TenTo(power) => (1, power + 9),
    };
    let nanos = shifted(whole, fraction, factor, power)?;
    Some(if negative { -nanos } else { nanos })
}

/// `whole.fraction * factor * 10^power`, rounded up.
fn shifted(whole: &str, fraction: &str, factor: i128, power: i32) -> Option<i128> {
    let fraction = fraction.trim_end_matches('0');
    let mantissa = digits(whole)?
        .checked_mul(ten_to(fraction.len())?)?
        .checked_add(digits(fraction)?)?;
    let product = mantissa.checked_mul(factor)?;
    match power - i32::try_from(fraction.len()).ok()? {
        up @ 0.. => product.checked_mul(if product == 0 {
            1
        } else {
            ten_to(usize::try_from(up).ok()?)?
        }),
        down => {
            let Some(divisor) = ten_to(usize::try_from(down.unsigned_abs()).ok()?) else {
                return Some(i128::from(product > 0)); // smaller than 10^-38: the least there is
            };
            Some(product / divisor + i128::from(product % divisor > 0))
        }
    }
}

fn digits(text: &str) -> Option<i128> {
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    match text.trim_start_matches('0') {
        "" => Some(0),
        significant => significant.parse().ok(),
    }
}

fn ten_to(power: usize) -> Option<i128> {
    10_i128.checked_pow(u32::try_from(power).ok()?)
}

/// The shortest exact text with the largest suffix that divides the value.
fn written(nanos: i128, form: Form) -> String {
    if nanos == 0 {
        return "0".to_owned();
    }
    if form == Form::Binary && nanos % ONE == 0 {
        let whole = nanos / ONE;
        let fits = |bits: u32| whole % (1_i128 << bits) == 0;
        return match BINARY.iter().find(|(_, bits)| fits(*bits)) {
            Some((name, bits)) => format!("{}{name}", whole >> bits),
            None => whole.to_string(),
        };
    }
    let divisor = |power: i32| 10_i128.pow((power + 9).unsigned_abs());
    let (name, power) = DECIMAL
        .iter()
        .find(|(_, power)| nanos % divisor(*power) == 0)
        .expect("a billionth divides every value");
    format!("{}{name}", nanos / divisor(*power))
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Quantity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Text(String),
            Number(serde_json::Number),
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Text(text) => text,
            Written::Number(number) => number.to_string(),
        };
        Self::parse(&text)
            .filter(|quantity| !quantity.is_negative())
            .ok_or_else(|| {
                de::Error::custom(format_args!("{text:?} is no quantity such as 100m or 1Gi"))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nanos(text: &str) -> Option<i128> {
        Quantity::parse(text).map(|q| q.nanos)
    }

    #[test]
    fn every_form_of_the_grammar_has_its_exact_value() {
        let cases = [
            ("0", 0),
            ("1", ONE),
            ("+1", ONE),
            ("-1", -ONE),
            ("100m", ONE / 10),
            ("0.1", ONE / 10),
            (".5", ONE / 2),
            ("5.", 5 * ONE),
            ("1.50", 3 * ONE / 2),
            ("1n", 1),
            ("1u", 1_000),
            ("1k", 1_000 * ONE),
            ("1Ki", 1_024 * ONE),
            ("1.5Gi", 1_610_612_736 * ONE),
            ("1e3", 1_000 * ONE),
            ("1E3", 1_000 * ONE),
            ("1E", 1_000_000_000_000_000_000 * ONE),
            ("1Ei", (1_i128 << 60) * ONE),
            ("1e-3", ONE / 1_000),
            ("0.0000000001", 1), // finer than n: rounded up
            ("1e-400", 1),
            ("0e900", 0),
            ("007", 7 * ONE),
        ];
        for (text, value) in cases {
            assert_eq!(nanos(text), Some(value), "{text}");
        }
    }

    #[test]
    fn what_kubernetes_refuses_is_refused() {
        let bad = [
            "",
            " ",
            "m",
            ".",
            "+",
            "-",
            "1 ",
            " 1",
            "1mm",
            "1K",
            "1ki",
            "1KI",
            "1g",
            "1e",
            "1eE",
            "--1",
            "1-",
            "1.2.3",
            "1,5",
            "0x10",
            "1e99999999999",
            "1e999",
            "9999999999999999999999999999999999999999",
            "１",
            "1m\0",
            "NaN",
            "inf",
        ];
        for text in bad {
            assert_eq!(nanos(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_sum_reads_like_its_first_operand() {
        let cases = [
            ("1", "100m", "1100m"),
            ("900m", "100m", "1"),
            ("1Gi", "128Mi", "1152Mi"),
            ("1G", "1Gi", "2073741824"),
            ("1Gi", "1", "1073741825"),
            ("1.5", "0", "1500m"),
            ("0", "0", "0"),
            ("2k", "1", "2001"),
            ("1Ki", "1m", "1024001m"),
            ("1u", "1n", "1001n"),
        ];
        for (a, b, sum) in cases {
            let plus = Quantity::parse(a).and_then(|a| a.plus(&Quantity::parse(b)?));
            assert_eq!(plus.as_ref().map(Quantity::as_str), Some(sum), "{a} + {b}");
            assert_eq!(plus, Quantity::parse(sum), "{a} + {b} reads back");
        }
    }
}
