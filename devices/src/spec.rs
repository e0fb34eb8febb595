//! The option syntax of every device flag: `word,key=value,key=value`.
//!
//! A [`Spec`] remembers the flag it came from, so that every error names the option, and insists
//! that each key is consumed, so that a misspelt key is never silently ignored.

use std::{fmt::Display, path::PathBuf, str::FromStr};

/// What was wrong with an option's value.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// A key that this option does not know.
    #[error("--{option}: unknown key '{key}' (known: {known})")]
    UnknownKey {
        /// The flag, without dashes.
        option: String,
        /// The offending key.
        key: String,
        /// The keys that were asked for, comma separated.
        known: String,
    },
    /// The same key twice where one value is meant.
    #[error("--{option}: key '{key}' is given more than once")]
    DuplicateKey {
        /// The flag, without dashes.
        option: String,
        /// The offending key.
        key: String,
    },
    /// A key that must be there is not.
    #[error("--{option}: '{key}=' is missing")]
    MissingKey {
        /// The flag, without dashes.
        option: String,
        /// The key that is missing.
        key: String,
    },
    /// A key that needs a value stands alone.
    #[error("--{option}: '{key}' needs a value: {key}=…")]
    NoValue {
        /// The flag, without dashes.
        option: String,
        /// The key that stands alone.
        key: String,
    },
    /// What the option begins with is missing.
    #[error("--{option}: it begins with {expected}")]
    MissingWord {
        /// The flag, without dashes.
        option: String,
        /// What it begins with.
        expected: String,
    },
    /// A value that cannot be understood or is out of range.
    #[error("--{option}: {key}={value}: {reason}")]
    InvalidValue {
        /// The flag, without dashes.
        option: String,
        /// The key.
        key: String,
        /// The value as given.
        value: String,
        /// What is expected instead.
        reason: String,
    },
    /// A word without `=` that this option does not know.
    #[error("--{option}: '{word}' is not understood; {expected}")]
    UnexpectedWord {
        /// The flag, without dashes.
        option: String,
        /// The word as given.
        word: String,
        /// What is expected instead.
        expected: String,
    },
}

/// A parsed `word,key=value,…` option whose keys are taken one by one.
#[derive(Debug, Clone)]
pub struct Spec {
    option: String,
    word: Option<String>,
    /// Keys and their values; those that stand alone have none.
    pairs: Vec<(String, Option<String>)>,
    asked: Vec<&'static str>,
}

impl Spec {
    /// Splits the value of the flag `--{option}`. A first element without `=` is the
    /// [`word`](Self::take_word); a key without `=` further on switches something on.
    pub fn parse(option: &str, text: &str) -> Result<Self, SpecError> {
        let mut word = None;
        let mut pairs = Vec::new();
        for (index, element) in text.split(',').enumerate() {
            match element.split_once('=') {
                Some((key, value)) => pairs.push((key.to_owned(), Some(value.to_owned()))),
                None if index == 0 => {
                    if !element.is_empty() {
                        word = Some(element.to_owned());
                    }
                }
                None if element.is_empty() => {}
                None => pairs.push((element.to_owned(), None)),
            }
        }
        Ok(Self { option: option.to_owned(), word, pairs, asked: Vec::new() })
    }

    /// The flag this came from, without dashes.
    pub fn option(&self) -> &str {
        &self.option
    }

    /// The leading word without `=`, if any.
    pub fn take_word(&mut self) -> Option<String> {
        self.word.take()
    }

    /// The value of a key that may be given once.
    pub fn take(&mut self, key: &'static str) -> Result<Option<String>, SpecError> {
        let mut values = self.take_all(key)?;
        if values.len() > 1 {
            return Err(SpecError::DuplicateKey { option: self.option.clone(), key: key.into() });
        }
        Ok(values.pop())
    }

    /// All values of a key that may be given several times, in order.
    pub fn take_all(&mut self, key: &'static str) -> Result<Vec<String>, SpecError> {
        let values = self.take_raw(key).into_iter();
        let missing = || SpecError::NoValue { option: self.option.clone(), key: key.to_owned() };
        values.map(|value| value.ok_or_else(missing)).collect()
    }

    fn take_raw(&mut self, key: &'static str) -> Vec<Option<String>> {
        self.asked.push(key);
        let (hits, rest) =
            std::mem::take(&mut self.pairs).into_iter().partition(|(name, _)| name == key);
        self.pairs = rest;
        Vec::into_iter(hits).map(|(_, value)| value).collect()
    }

    /// The error for a key that must be there and is not. To be returned after
    /// [`finish`](Self::finish), so that a misspelt key is what the user hears of.
    pub fn missing(&self, key: &str) -> SpecError {
        SpecError::MissingKey { option: self.option.clone(), key: key.to_owned() }
    }

    /// The same for what stands in front of all keys.
    pub fn missing_word(&self, expected: &str) -> SpecError {
        SpecError::MissingWord { option: self.option.clone(), expected: expected.to_owned() }
    }

    /// A value parsed with [`FromStr`].
    pub fn take_parsed<T>(&mut self, key: &'static str) -> Result<Option<T>, SpecError>
    where
        T: FromStr,
        T::Err: Display,
    {
        let Some(value) = self.take(key)? else { return Ok(None) };
        match value.parse() {
            Ok(parsed) => Ok(Some(parsed)),
            Err(error) => Err(self.invalid(key, &value, error)),
        }
    }

    /// An `on`/`off` switch (also `true`/`false`, `yes`/`no`, `1`/`0`).
    pub fn take_switch(&mut self, key: &'static str) -> Result<Option<bool>, SpecError> {
        let mut values = self.take_raw(key);
        let value = values.pop().map(|value| value.unwrap_or_else(|| "on".to_owned()));
        let Some(value) = value else { return Ok(None) };
        if !values.is_empty() {
            return Err(SpecError::DuplicateKey { option: self.option.clone(), key: key.into() });
        }
        match value.as_str() {
            "on" | "true" | "yes" | "1" => Ok(Some(true)),
            "off" | "false" | "no" | "0" => Ok(Some(false)),
            _ => Err(self.invalid(key, &value, "expected on or off")),
        }
    }

    /// A file system path; empty is refused.
    pub fn take_path(&mut self, key: &'static str) -> Result<Option<PathBuf>, SpecError> {
        match self.take(key)? {
            Some(value) if value.is_empty() => Err(self.invalid(key, &value, "the path is empty")),
            other => Ok(other.map(PathBuf::from)),
        }
    }

    /// Builds the error for a value of this option.
    pub fn invalid(&self, key: &str, value: &str, reason: impl Display) -> SpecError {
        SpecError::InvalidValue {
            option: self.option.clone(),
            key: key.to_owned(),
            value: value.to_owned(),
            reason: reason.to_string(),
        }
    }

    /// Ends parsing: anything not taken so far is an error that lists the known keys.
    pub fn finish(self) -> Result<(), SpecError> {
        if let Some(word) = self.word {
            let expected = if self.asked.is_empty() {
                "this option takes no value".to_owned()
            } else {
                format!("expected {}=…", self.asked.join("=…, "))
            };
            return Err(SpecError::UnexpectedWord { option: self.option, word, expected });
        }
        match self.pairs.into_iter().next() {
            None => Ok(()),
            Some((key, _)) => Err(SpecError::UnknownKey {
                option: self.option,
                key,
                known: self.asked.join(", "),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_pairs_and_bare_keys() {
        let mut spec = Spec::parse("net", "user,hostfwd=a,ro,hostfwd=b").unwrap();
        assert_eq!(spec.take_word().as_deref(), Some("user"));
        assert_eq!(spec.take_all("hostfwd").unwrap(), ["a", "b"]);
        assert_eq!(spec.take_switch("ro"), Ok(Some(true)));
        spec.finish().unwrap();
    }

    #[test]
    fn every_error_names_the_option() {
        let mut spec = Spec::parse("disk", "path=x,tpyo=1").unwrap();
        spec.take("path").unwrap();
        assert_eq!(
            spec.finish().unwrap_err().to_string(),
            "--disk: unknown key 'tpyo' (known: path)"
        );
        let mut spec = Spec::parse("disk", "path=x,path=y,ro=maybe").unwrap();
        assert_eq!(
            spec.take("path").unwrap_err().to_string(),
            "--disk: key 'path' is given more than once"
        );
        assert_eq!(
            spec.take_switch("ro").unwrap_err().to_string(),
            "--disk: ro=maybe: expected on or off"
        );
        assert_eq!(spec.missing("nope").to_string(), "--disk: 'nope=' is missing");
        assert_eq!(spec.missing_word("a FILE").to_string(), "--disk: it begins with a FILE");
        let mut spec = Spec::parse("disk", "x,serial").unwrap();
        assert_eq!(
            spec.take("serial").unwrap_err().to_string(),
            "--disk: 'serial' needs a value: serial=…"
        );
    }
}
