//! A JSON value with its place in the answer, for errors that name what is wrong.

use serde_json::Value;

use super::GraphError;

/// Longest text that we take from QEMU (a `json:{…}` file name can be long).
pub(super) const MAX_TEXT_BYTES: usize = 256 << 10;

/// A value and where it was.
pub(super) struct Item<'a> {
    value: &'a Value,
    at: String,
}

impl<'a> Item<'a> {
    pub fn root(question: &str, value: &'a Value) -> Self {
        Item { value, at: question.to_owned() }
    }

    /// A member that must be there; `null` counts as missing.
    pub fn member(&self, name: &str) -> Result<Item<'a>, GraphError> {
        match self.optional(name)? {
            Some(item) => Ok(item),
            None => Err(GraphError::Missing { at: format!("{}.{name}", self.at) }),
        }
    }

    /// A member that may be there.
    pub fn optional(&self, name: &str) -> Result<Option<Item<'a>>, GraphError> {
        let object = self.value.as_object().ok_or_else(|| self.wrong("an object"))?;
        let found = object.get(name).filter(|v| !v.is_null());
        Ok(found.map(|value| Item { value, at: format!("{}.{name}", self.at) }))
    }

    /// The members of a list of at most `limit`.
    pub fn list(&self, limit: usize) -> Result<Vec<Item<'a>>, GraphError> {
        let list = self.value.as_array().ok_or_else(|| self.wrong("a list"))?;
        if list.len() > limit {
            return Err(self.too_large(limit as u64));
        }
        Ok(list.iter().enumerate().map(|(i, value)| Item { value, at: format!("{}[{i}]", self.at) }).collect())
    }

    pub fn text(&self) -> Result<&'a str, GraphError> {
        let text = self.value.as_str().ok_or_else(|| self.wrong("a text"))?;
        if text.len() > MAX_TEXT_BYTES {
            return Err(self.too_large(MAX_TEXT_BYTES as u64));
        }
        Ok(text)
    }

    pub fn flag(&self) -> Result<bool, GraphError> {
        self.value.as_bool().ok_or_else(|| self.wrong("true or false"))
    }

    pub fn number(&self, limit: u64) -> Result<u64, GraphError> {
        let number = self.value.as_u64().ok_or_else(|| self.wrong("a whole number"))?;
        if number > limit { Err(self.too_large(limit)) } else { Ok(number) }
    }

    fn wrong(&self, wanted: &'static str) -> GraphError {
        GraphError::WrongType { at: self.at.clone(), wanted }
    }

    fn too_large(&self, limit: u64) -> GraphError {
        GraphError::TooLarge { at: self.at.clone(), limit }
    }
}
