//! System call filters (seccomp(2)) made from tables.
//!
//! A [`Row`] allows one system call, or some of its uses, and says what it is needed for. What no row
//! mentions raises SIGSYS: [`report`] prints which thread wanted what, and the process dies of that
//! signal. Calls that libraries make as a matter of habit and can do without get a polite error
//! instead ([`Rule::Refuse`]).

mod names;
mod report;

use std::collections::{BTreeMap, BTreeSet};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

pub use names::name;

/// What a row says about its system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Allowed.
    Allow,
    /// Allowed if argument `index` (0 to 5), of which only the bits in `mask` count, has one of
    /// `values`. Several rows for one call add up.
    AllowIf {
        /// Which argument.
        index: u8,
        /// The bits that count.
        mask: u64,
        /// What they may be.
        values: &'static [u64],
    },
    /// Allowed if argument `index` is the number of this process.
    AllowOwnPid {
        /// Which argument.
        index: u8,
    },
    /// Fails with this error, without further ado, unless another row allows it.
    Refuse(i32),
}

/// One row of a table.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Number of the system call.
    pub number: i64,
    /// What is allowed.
    pub rule: Rule,
    /// What it is needed for.
    pub reason: &'static str,
}

/// A row that allows a call.
pub const fn allow(number: i64, reason: &'static str) -> Row {
    Row { number, rule: Rule::Allow, reason }
}

/// A row that allows a call for some values of one argument.
pub const fn allow_if(
    number: i64,
    index: u8,
    mask: u64,
    values: &'static [u64],
    reason: &'static str,
) -> Row {
    Row { number, rule: Rule::AllowIf { index, mask, values }, reason }
}

/// A row that makes a call fail.
pub const fn refuse(number: i64, errno: i32, reason: &'static str) -> Row {
    Row { number, rule: Rule::Refuse(errno), reason }
}

/// What happens to calls that no row allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Violation {
    /// SIGSYS: a line on standard error, then the end.
    Kill,
    /// They are carried out, and the kernel's log tells about them.
    Log,
}

/// Who gets the filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// This thread and those it starts.
    Thread,
    /// All threads of the process.
    Process,
}

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The table contradicts the rules of the filter language: a defect.
    #[error("the table of system calls cannot be made into a filter: {0}")]
    Table(String),
    /// The kernel refused.
    #[error("the kernel refused the filter of system calls: {0}")]
    Kernel(String),
}

/// Filters, ready to be installed.
pub struct Filter {
    programs: Vec<BpfProgram>,
}

impl std::fmt::Debug for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let instructions: Vec<usize> = self.programs.iter().map(Vec::len).collect();
        f.debug_struct("Filter").field("instructions", &instructions).finish()
    }
}

impl Filter {
    /// Compiles tables.
    ///
    /// # Errors
    ///
    /// When the tables contradict themselves.
    pub fn new(tables: &[&[Row]], violation: Violation) -> Result<Self, Error> {
        let table = |error: seccompiler::BackendError| Error::Table(error.to_string());
        let mut conditional: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        let mut allowed = BTreeSet::new();
        let mut refused: BTreeMap<i64, i32> = BTreeMap::new();
        for row in tables.iter().copied().flatten() {
            let rules = conditional.entry(row.number).or_default();
            match row.rule {
                Rule::Allow => {
                    allowed.insert(row.number);
                }
                Rule::AllowIf { index, mask, values } => {
                    for value in values {
                        rules.push(rule(index, mask, *value).map_err(table)?);
                    }
                }
                Rule::AllowOwnPid { index } => {
                    let mask = u64::from(u32::MAX);
                    rules.push(rule(index, mask, std::process::id().into()).map_err(table)?);
                }
                Rule::Refuse(errno) => {
                    refused.insert(row.number, errno);
                }
            }
        }
        // An empty list of rules means: whatever the arguments. The verdict of several filters is
        // the sternest one, so what is refused with an error has to pass this one.
        for (number, rules) in &mut conditional {
            if allowed.contains(number) || (refused.contains_key(number) && rules.is_empty()) {
                rules.clear();
            }
        }
        refused.retain(|number, _| {
            !allowed.contains(number) && conditional.get(number).is_some_and(Vec::is_empty)
        });
        if violation == Violation::Log {
            // Then they are what is logged.
            conditional.retain(|number, _| !refused.contains_key(number));
        }
        let mismatch = match violation {
            Violation::Kill => SeccompAction::Trap,
            Violation::Log => SeccompAction::Log,
        };
        let mut programs = vec![compile(conditional, mismatch, SeccompAction::Allow)?];
        if violation == Violation::Kill {
            let errors: BTreeSet<i32> = refused.values().copied().collect();
            for errno in errors {
                let calls = refused.iter().filter(|(_, with)| **with == errno);
                let rules = calls.map(|(number, _)| (*number, Vec::new())).collect();
                let action = SeccompAction::Errno(errno.unsigned_abs());
                programs.push(compile(rules, SeccompAction::Allow, action)?);
            }
        }
        Ok(Self { programs })
    }

    /// Installs the filters for good. No new privileges can be had after that (prctl(2),
    /// `PR_SET_NO_NEW_PRIVS`).
    ///
    /// # Errors
    ///
    /// When the kernel has no seccomp, or [`Scope::Process`] meets threads with other filters.
    pub fn install(&self, scope: Scope) -> Result<(), Error> {
        report::install();
        // The polite refusals first: the main filter need not allow installing more of them.
        for program in self.programs.iter().rev() {
            let result = match scope {
                Scope::Thread => seccompiler::apply_filter(program),
                Scope::Process => seccompiler::apply_filter_all_threads(program),
            };
            result.map_err(|error| Error::Kernel(error.to_string()))?;
        }
        Ok(())
    }
}

fn rule(index: u8, mask: u64, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    // The kernel looks at the lower half of arguments it declares as 32 bits wide.
    let length = if mask >> 32 == 0 { SeccompCmpArgLen::Dword } else { SeccompCmpArgLen::Qword };
    let condition =
        SeccompCondition::new(index, length, SeccompCmpOp::MaskedEq(mask), value & mask)?;
    SeccompRule::new(vec![condition])
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    mismatch: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, Error> {
    let defect = |error: seccompiler::BackendError| Error::Table(error.to_string());
    let filter =
        SeccompFilter::new(rules, mismatch, matched, TargetArch::x86_64).map_err(defect)?;
    filter.try_into().map_err(defect)
}
