//! JSON objects as the original reads them: Go's `encoding/json` finds a member without regard to the case of its key, so
//! `Directrouting`, `vni` and `VNI` are all in use.

use serde_json::{Map, Value};

/// The members of an object that nobody has asked for yet.
///
/// Each is taken once by its name; what is left in the end was not known to the reader.
#[derive(Debug)]
pub(crate) struct Members(Vec<(String, Value)>);

impl Members {
    /// # Errors
    /// Two spellings of one key: which of them counts would depend on their order, which JSON does not promise to keep.
    pub(crate) fn new(object: Map<String, Value>) -> Result<Self, GivenTwice> {
        let mut members: Vec<(String, Value)> = object.into_iter().collect();
        members.sort_by_cached_key(|(key, _)| key.to_ascii_lowercase());
        let twice = members
            .windows(2)
            .find(|pair| pair[0].0.eq_ignore_ascii_case(&pair[1].0));
        match twice {
            Some(pair) => Err(GivenTwice {
                first: pair[0].0.clone(),
                second: pair[1].0.clone(),
            }),
            None => Ok(Members(members)),
        }
    }

    /// The member of this name, if it is there; `null` is the same as absent, as in Go.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        let at = self.0.iter().position(|(key, _)| key.eq_ignore_ascii_case(name))?;
        Some(self.0.swap_remove(at).1).filter(|value| !value.is_null())
    }

    /// The keys that nobody took, in order.
    pub(crate) fn into_rest(self) -> Vec<String> {
        let mut keys: Vec<String> = self.0.into_iter().map(|(key, _)| key).collect();
        keys.sort();
        keys
    }
}

/// One key in two spellings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GivenTwice {
    pub(crate) first: String,
    pub(crate) second: String,
}

/// What a value is, in a reader's words: `a string`, `a number`…
pub(crate) fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The text on one line, control characters escaped, and cut where a message would become unreadable.
pub(crate) fn excerpt(text: &str) -> String {
    // Long enough for any sensible configuration's first keys, short enough for one line of a log.
    const LONGEST: usize = 80;
    let mut shown: String = text.trim().chars().take(LONGEST).flat_map(one_line).collect();
    if text.trim().chars().count() > LONGEST {
        shown.push('…');
    }
    shown
}

fn one_line(c: char) -> impl Iterator<Item = char> {
    let escaped = if c.is_control() { Some(c.escape_default()) } else { None };
    let plain = if c.is_control() { None } else { Some(c) };
    escaped.into_iter().flatten().chain(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(text: &str) -> Result<Members, GivenTwice> {
        Members::new(serde_json::from_str(text).unwrap())
    }

    #[test]
    fn members_are_found_without_regard_to_case_and_only_once() {
        let mut members = members(r#"{"Directrouting":true,"vni":7,"MTU":null,"Colour":1}"#).unwrap();
        assert_eq!(members.take("DirectRouting"), Some(Value::Bool(true)));
        assert_eq!(members.take("DirectRouting"), None);
        assert_eq!(members.take("VNI"), Some(7.into()));
        assert_eq!(members.take("MTU"), None);
        assert_eq!(members.into_rest(), ["Colour"]);
    }

    #[test]
    fn two_spellings_of_one_key_are_refused() {
        let twice = members(r#"{"VNI":1,"Port":2,"vni":3}"#).unwrap_err();
        assert_eq!(
            twice,
            GivenTwice {
                first: "VNI".into(),
                second: "vni".into()
            }
        );
    }

    #[test]
    fn excerpts_are_short_and_on_one_line() {
        assert_eq!(excerpt("  {\n\"a\"\t1} "), "{\\n\"a\"\\t1}");
        assert_eq!(excerpt(&"é".repeat(100)).chars().count(), 81);
    }
}
