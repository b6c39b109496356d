//! Ways to break a document.

use serde_json::{Value, json};

use crate::dice::Dice;

/// What parsers trip over, put in anywhere.
const TOKENS: &[&[u8]] = &[
    b"\0",
    b"\"",
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"null",
    b"-0",
    b"1e999",
    b"99999999999999999999",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xf0\x9f",
    b"\r\n",
    b"\n---\n",
    b"{{",
    b"$(",
    b"../",
    b"%2e",
    b"~1",
    b"&a",
    b"*a",
    b"!!binary ",
    b"<<: ",
    b"\x30\x84\xff\xff\xff\xff",
    b"\x30\x80",
    b"-----BEGIN CERTIFICATE-----\n",
    b"-----END",
    b"=",
    b".",
    b"..",
    b" ",
    b"\t",
    b"\"name\":\"malha-proxy\",",
    b"\"spec\":null,",
    b"true",
    b"-1",
    b"65536",
];

/// One of the documents, broken once or several times; now and then mere noise, and now and then whole.
pub(crate) fn mutated(dice: &mut Dice, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = dice.pick(corpus).clone();
    match dice.below(40) {
        0 => return (0..dice.below(300)).map(|_| dice.next() as u8).collect(),
        1 => {
            return (0..dice.below(60))
                .flat_map(|_| dice.pick(TOKENS).to_vec())
                .collect();
        }
        2 => return bytes,
        _ => {}
    }
    for _ in 0..1 + dice.below(3) {
        mutate(dice, &mut bytes, corpus);
    }
    bytes
}

fn mutate(dice: &mut Dice, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
    if bytes.is_empty() {
        return;
    }
    let at = dice.below(bytes.len());
    let span = at..(at + 1 + dice.below(16)).min(bytes.len());
    match dice.below(9) {
        0 => bytes[at] ^= 1 << dice.below(8),
        1 => bytes[at] = dice.next() as u8,
        2 => {
            bytes.drain(span);
        }
        3 => bytes.truncate(at),
        4 => {
            let twice = bytes[span].to_vec();
            bytes.splice(at..at, twice);
        }
        5 | 6 => {
            let token = *dice.pick(TOKENS);
            bytes.splice(at..at, token.iter().copied());
        }
        7 => {
            // a digit for another: numbers and lengths
            if let Some(digit) = bytes[at..].iter_mut().find(|byte| byte.is_ascii_digit()) {
                *digit = b'0' + dice.below(10) as u8;
            }
        }
        _ => {
            // the end of another document, or of the same
            let other = dice.pick(corpus);
            let from = dice.below(other.len());
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
    }
}

/// One field anywhere in a JSON value replaced, removed or doubled.
pub(crate) fn field(dice: &mut Dice, value: &mut Value) {
    let odd = [
        json!(null),
        json!(-1),
        json!("x"),
        json!("{"),
        json!([]),
        json!([null]),
        json!({}),
        json!({"name": "malha-proxy"}),
        json!(true),
    ];
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let key = dice
                .pick(&fields.keys().cloned().collect::<Vec<_>>())
                .clone();
            match dice.below(10) {
                0 => {
                    fields.shift_remove(&key);
                }
                1 => {
                    fields.insert(key, dice.pick(&odd).clone());
                }
                _ => field(dice, &mut fields[&key]),
            }
        }
        Value::Array(items) if !items.is_empty() => {
            let at = dice.below(items.len());
            match dice.below(10) {
                0 => {
                    items.remove(at);
                }
                1 => items[at] = dice.pick(&odd).clone(),
                2 => items.push(items[at].clone()),
                _ => field(dice, &mut items[at]),
            }
        }
        Value::String(text) if !text.is_empty() && dice.chance(50) => {
            let mut bytes = std::mem::take(text).into_bytes();
            mutate(dice, &mut bytes, &[b"other".to_vec()]);
            *text = String::from_utf8_lossy(&bytes).into_owned();
        }
        other => *other = dice.pick(&odd).clone(),
    }
}
