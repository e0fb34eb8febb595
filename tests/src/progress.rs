//! Progress of long steps on stderr, with the time each took.

use std::fmt::Display;
use std::time::Instant;

use anyhow::Result;

use crate::stop;

/// Runs a step, saying on stderr that it begins and how long it took.
///
/// # Errors
/// What the step returned.
pub fn step<T>(what: impl Display, run: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {what} ...");
    let start = Instant::now();
    let result = run();
    let took = start.elapsed().as_secs_f64();
    match &result {
        Ok(_) => eprintln!("    {what}: done in {took:.1} s"),
        Err(_) if stop::requested().is_some() => eprintln!("    {what}: stopped after {took:.1} s"),
        Err(_) => eprintln!("    {what}: FAILED after {took:.1} s"),
    }
    result
}

/// Says one thing on stderr, aligned with the steps.
pub fn note(what: impl Display) {
    eprintln!("    {what}");
}
