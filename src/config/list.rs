//! Lists of keys and values, as options of devices have them.

use std::num::ParseIntError;
use std::str::FromStr;

/// Goes through `text`, KEY=VALUE or KEY between commas. `set` takes each part, its key, and its value if it has one. A key comes once,
/// unless it is `repeatable`.
pub(super) fn for_each_key(
    text: &str,
    repeatable: &[&str],
    mut set: impl FnMut(&str, &str, Option<&str>) -> Result<(), String>,
) -> Result<(), String> {
    let mut seen = Vec::new();
    for part in text.split(',') {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (part, None),
        };
        set(part, key, value)?;
        if seen.contains(&key) && !repeatable.contains(&key) {
            return Err(format!("'{part}': {key} comes twice"));
        }
        seen.push(key);
    }
    Ok(())
}

/// The number in `part`, which says what is wrong.
pub(super) fn number<T: FromStr<Err = ParseIntError>>(
    part: &str,
    value: &str,
) -> Result<T, String> {
    value.parse().map_err(|e| format!("'{part}': {e}"))
}
