//! Every key of `ds_config.json` as data: kind, default, and what becomes of it here.
//!
//! A row a key; to change what is honoured, change its row. Nothing here reads a file.

pub mod optimizer;
pub mod scheduler;
mod top;
mod unsupported;
mod zero;

/// What a value must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// An integer, also written `5e8`, at least this.
    Int(u64),
    /// An integer that may be negative.
    Signed,
    /// A finite number from this to this, both included.
    Number(f64, f64),
    /// A text.
    Text,
    /// One of these texts, in any case.
    Choice(&'static [&'static str]),
    /// `fp32`, `fp16` or `bf16`, by any of their names.
    Float,
    /// A list of two numbers in `[0, 1)`.
    Betas,
    /// A list.
    List,
    /// Anything, an object included.
    Any,
}

/// What becomes of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "status", content = "why")]
pub enum Status {
    /// It does what it does in DeepSpeed.
    Honoured,
    /// There is nothing for it to do, and why.
    NoMeaning(&'static str),
    /// It asks for something that is not there, and why. An error, unless it asks for nothing.
    Unsupported(&'static str),
}

impl Status {
    /// The words of a table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Honoured => "honoured",
            Self::NoMeaning(_) => "no meaning here",
            Self::Unsupported(_) => "not supported",
        }
    }

    /// The reason, where there is one.
    pub fn why(self) -> Option<&'static str> {
        match self {
            Self::Honoured => None,
            Self::NoMeaning(why) | Self::Unsupported(why) => Some(why),
        }
    }
}

/// A key of a section.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Key {
    /// Its name in the section.
    pub name: &'static str,
    /// What it must be.
    pub kind: Kind,
    /// Its default as JSON.
    pub default: &'static str,
    /// What becomes of it.
    pub status: Status,
}

/// Keys that share the path above them.
#[derive(Clone, Copy, Debug)]
pub struct Section {
    /// The path above them; empty at the root.
    pub path: &'static str,
    /// Whether other keys may stand beside them, and what becomes of those.
    pub others: Option<Status>,
    /// The keys.
    pub keys: &'static [Key],
}

/// The sections, without the parameters of optimizers and schedulers.
pub const SECTIONS: &[&[Section]] = &[top::SECTIONS, zero::SECTIONS, unsupported::SECTIONS];

const YES: Status = Status::Honoured;
const BOOL: Kind = Kind::Bool;
const INT: Kind = Kind::Int(0);
const COUNT: Kind = Kind::Int(1);
const TEXT: Kind = Kind::Text;
const NUMBER: Kind = Kind::Number(f64::MIN, f64::MAX);
const POSITIVE: Kind = Kind::Number(f64::MIN_POSITIVE, f64::MAX);
const NOT_NEGATIVE: Kind = Kind::Number(0.0, f64::MAX);
const UNIT: Kind = Kind::Number(0.0, 1.0);

const fn key(name: &'static str, kind: Kind, default: &'static str, status: Status) -> Key {
    Key {
        name,
        kind,
        default,
        status,
    }
}

const fn section(path: &'static str, keys: &'static [Key]) -> Section {
    Section {
        path,
        others: None,
        keys,
    }
}
