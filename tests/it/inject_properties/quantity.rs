//! Kubernetes quantities, read a second time and differently: into billionths.

/// In billionths; `None` where the text is no quantity.
pub(crate) fn nano(text: &str) -> Option<i128> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.' && c != '+' && c != '-')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (sign, number) = match number.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let digits = |part: &str| part.chars().all(|c| c.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || fraction.len() > 9 {
        return None;
    }
    let whole: i128 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    let fraction: i128 = format!("{fraction:0<9}").parse().ok()?;
    let value = sign * (whole * 1_000_000_000 + fraction);
    let power = |base: i128, exponent: u32| base.checked_pow(exponent);
    let factor = match suffix {
        "" => Some(1),
        "n" => return Some(value / 1_000_000_000),
        "u" => return Some(value / 1_000_000),
        "m" => return Some(value / 1_000),
        "k" => power(10, 3),
        "M" => power(10, 6),
        "G" => power(10, 9),
        "T" => power(10, 12),
        "P" => power(10, 15),
        "E" => power(10, 18),
        "Ki" => power(1024, 1),
        "Mi" => power(1024, 2),
        "Gi" => power(1024, 3),
        "Ti" => power(1024, 4),
        "Pi" => power(1024, 5),
        "Ei" => power(1024, 6),
        other => power(10, other.strip_prefix(['e', 'E'])?.parse().ok()?),
    }?;
    value.checked_mul(factor)
}

#[test]
fn quantities_are_read_as_kubernetes_reads_them() {
    for (text, value) in [
        ("1", Some(1_000_000_000)),
        ("100m", Some(100_000_000)),
        ("0.5", Some(500_000_000)),
        ("1e3", Some(1_000_000_000_000)),
        ("2Ki", Some(2_048_000_000_000)),
        ("1.5Gi", Some(1_610_612_736_000_000_000)),
        ("-1", Some(-1_000_000_000)),
        ("", None),
        ("Gi", None),
        ("1e", None),
        ("1 Gi", None),
        ("1KiB", None),
        ("½", None),
    ] {
        assert_eq!(nano(text), value, "{text:?}");
    }
}
