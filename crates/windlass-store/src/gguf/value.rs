//! Typed metadata values, and how a reader asks for them.

use std::fmt;

/// A scalar type of metadata, by its number in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Kind {
    /// `u8`.
    U8 = 0,
    /// `i8`.
    I8 = 1,
    /// `u16`.
    U16 = 2,
    /// `i16`.
    I16 = 3,
    /// `u32`.
    U32 = 4,
    /// `i32`.
    I32 = 5,
    /// `f32`.
    F32 = 6,
    /// A byte that is 0 or 1.
    Bool = 7,
    /// UTF-8 text.
    String = 8,
    /// `u64`.
    U64 = 10,
    /// `i64`.
    I64 = 11,
    /// `f64`.
    F64 = 12,
}

impl Kind {
    /// The number of arrays, which are no scalars.
    pub(super) const ARRAY: u32 = 9;

    /// The kind of a number in a file; `None` for an array and for unknown numbers.
    pub(super) fn from_id(id: u32) -> Option<Self> {
        use Kind::{Bool, F32, F64, I8, I16, I32, I64, String, U8, U16, U32, U64};
        let all = [U8, I8, U16, I16, U32, I32, F32, Bool, String, U64, I64, F64];
        all.into_iter().find(|kind| *kind as u32 == id)
    }

    /// Bytes that one value takes at least: all of it, or a string's length.
    pub(super) fn least_bytes(self) -> usize {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::U64 | Kind::I64 | Kind::F64 | Kind::String => 8,
        }
    }

    /// The name as in the format's documents: `u32`, `string`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::U8 => "u8",
            Kind::I8 => "i8",
            Kind::U16 => "u16",
            Kind::I16 => "i16",
            Kind::U32 => "u32",
            Kind::I32 => "i32",
            Kind::F32 => "f32",
            Kind::Bool => "bool",
            Kind::String => "string",
            Kind::U64 => "u64",
            Kind::I64 => "i64",
            Kind::F64 => "f64",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

macro_rules! values {
    ($($kind:ident $t:ty),*) => {
        /// A metadata value.
        #[derive(Clone, Debug, PartialEq)]
        #[expect(missing_docs, reason = "one variant for each kind")]
        pub enum Value {
            $($kind($t),)*
            Array(Array),
        }

        /// A list of values of one kind.
        #[derive(Clone, Debug, PartialEq)]
        #[expect(missing_docs, reason = "one variant for each kind")]
        pub enum Array {
            $($kind(Vec<$t>),)*
        }

        impl Array {
            /// The kind of its values.
            pub fn kind(&self) -> Kind {
                match self { $(Array::$kind(_) => Kind::$kind,)* }
            }

            /// Number of values.
            pub fn len(&self) -> usize {
                match self { $(Array::$kind(values) => values.len(),)* }
            }

            /// Whether there are none.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            /// The value at a position.
            pub fn get(&self, i: usize) -> Option<Value> {
                match self { $(Array::$kind(values) => values.get(i).cloned().map(Value::$kind),)* }
            }
        }

        impl Value {
            /// What it is, for messages: `u32`, `array of string`.
            pub fn describe(&self) -> String {
                match self {
                    $(Value::$kind(_) => Kind::$kind.name().to_owned(),)*
                    Value::Array(array) => format!("array of {}", array.kind()),
                }
            }
        }

        $(impl From<$t> for Value {
            fn from(value: $t) -> Self {
                Value::$kind(value)
            }
        }
        impl From<Vec<$t>> for Value {
            fn from(values: Vec<$t>) -> Self {
                Value::Array(Array::$kind(values))
            }
        })*
    };
}

values! {
    U8 u8, I8 i8, U16 u16, I16 i16, U32 u32, I32 i32, F32 f32, Bool bool, String String, U64 u64, I64 i64, F64 f64
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Value::String(value.to_owned())
    }
}

impl Value {
    /// Any integer.
    fn integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// Any number.
    fn number(&self) -> Option<f64> {
        match *self {
            Value::F32(v) => Some(v.into()),
            Value::F64(v) => Some(v),
            _ => self.integer().map(|v| v as f64),
        }
    }
}

/// A type that metadata can be read as. Integers may be stored in any integer type that holds the value, and numbers
/// with a fraction in any numeric type: writers differ.
pub trait FromValue<'a>: Sized {
    /// What a value must be, for messages.
    const EXPECTED: &'static str;
    /// The value as this type; `None` if it is of another kind, or out of range.
    fn from_value(value: &'a Value) -> Option<Self>;
}

macro_rules! from_integers {
    ($($t:ty)*) => { $(
        impl FromValue<'_> for $t {
            const EXPECTED: &'static str = concat!("an integer that fits ", stringify!($t));
            fn from_value(value: &Value) -> Option<Self> {
                value.integer()?.try_into().ok()
            }
        }
        impl FromValue<'_> for Vec<$t> {
            const EXPECTED: &'static str = concat!("an array of integers that fit ", stringify!($t));
            fn from_value(value: &Value) -> Option<Self> {
                convert(value)
            }
        }
    )* };
}
from_integers!(u8 i8 u16 i16 u32 i32 u64 i64 usize);

macro_rules! from_numbers {
    ($($t:ty)*) => { $(
        impl FromValue<'_> for $t {
            const EXPECTED: &'static str = "a number";
            fn from_value(value: &Value) -> Option<Self> {
                Some(value.number()? as $t)
            }
        }
        impl FromValue<'_> for Vec<$t> {
            const EXPECTED: &'static str = "an array of numbers";
            fn from_value(value: &Value) -> Option<Self> {
                convert(value)
            }
        }
    )* };
}
from_numbers!(f32 f64);

/// An array, value by value.
fn convert<T: for<'v> FromValue<'v>>(value: &Value) -> Option<Vec<T>> {
    let Value::Array(array) = value else {
        return None;
    };
    let one = |i| T::from_value(&array.get(i)?);
    (0..array.len()).map(one).collect()
}

impl FromValue<'_> for bool {
    const EXPECTED: &'static str = "true or false";
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }
}

impl FromValue<'_> for Vec<bool> {
    const EXPECTED: &'static str = "an array of true and false";
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Array(Array::Bool(values)) => Some(values.clone()),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "a string";
    fn from_value(value: &'a Value) -> Option<Self> {
        match value {
            Value::String(text) => Some(text),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a [String] {
    const EXPECTED: &'static str = "an array of strings";
    fn from_value(value: &'a Value) -> Option<Self> {
        match value {
            Value::Array(Array::String(texts)) => Some(texts),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a Array {
    const EXPECTED: &'static str = "an array";
    fn from_value(value: &'a Value) -> Option<Self> {
        match value {
            Value::Array(array) => Some(array),
            _ => None,
        }
    }
}
