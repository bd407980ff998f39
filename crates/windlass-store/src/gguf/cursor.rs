//! Reading a header front to back, never past its end.

use super::header::Problem;
use super::value::{Array, Kind, Value};

/// Memory reserved ahead of reading, in values; more is taken as values are found to be there.
const RESERVED: usize = 1 << 12;

/// A position in a file's bytes.
pub(super) struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(file: &'a [u8]) -> Self {
        Cursor { file, at: 0 }
    }

    /// Bytes read so far.
    pub fn position(&self) -> usize {
        self.at
    }

    /// Bytes that follow.
    pub fn remaining(&self) -> usize {
        self.file.len() - self.at
    }

    /// The next `count` bytes. `what` names them in messages.
    pub fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8], Problem> {
        let rest = &self.file[self.at..];
        let taken = usize::try_from(count).ok().and_then(|n| rest.get(..n));
        let Some(taken) = taken else {
            return Err(Problem::corrupt(format!(
                "cut short: {what} needs {count} bytes at byte {}, {} follow",
                self.at,
                rest.len()
            )));
        };
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Problem> {
        let bytes = self.take(N as u64, what)?;
        Ok(bytes.try_into().expect("taken as long"))
    }

    pub fn u32(&mut self, what: &str) -> Result<u32, Problem> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, what: &str) -> Result<u64, Problem> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A length and as many bytes of UTF-8.
    pub fn string(&mut self, what: &str) -> Result<&'a str, Problem> {
        let start = self.at;
        let length = self.u64(what)?;
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes).map_err(|error| {
            Problem::corrupt(format!(
                "{what} at byte {start} is not UTF-8 (byte {} of it)",
                error.valid_up_to()
            ))
        })
    }

    /// A count of things that take at least `least` bytes each: no more than the file can hold.
    pub fn count(&mut self, least: usize, what: &str) -> Result<usize, Problem> {
        let count = self.u64(what)?;
        if count > (self.remaining() / least) as u64 {
            return Err(Problem::corrupt(format!(
                "{count} {what} are announced, but only {} bytes follow",
                self.remaining()
            )));
        }
        Ok(count as usize)
    }

    /// The value of `key`: its type, then itself.
    pub fn value(&mut self, key: &str) -> Result<Value, Problem> {
        let what = format!("the value of key '{key}'");
        let id = self.u32(&what)?;
        if id != Kind::ARRAY {
            let kind = scalar(id, key, "a value")?;
            return self.scalar(kind, &what);
        }
        let id = self.u32(&what)?;
        if id == Kind::ARRAY {
            return Err(Problem::Unsupported {
                problem: format!("key '{key}' is an array of arrays"),
                hint: "no known program writes them: fetch the file again, or make it anew".into(),
            });
        }
        let kind = scalar(id, key, "an array")?;
        let least = kind.least_bytes();
        let count = self.count(least, &format!("values of key '{key}'"))?;
        Ok(Value::Array(self.values(kind, count, &what)?))
    }

    fn scalar(&mut self, kind: Kind, what: &str) -> Result<Value, Problem> {
        let one = self.values(kind, 1, what)?;
        Ok(one.get(0).expect("read one"))
    }

    fn values(&mut self, kind: Kind, count: usize, what: &str) -> Result<Array, Problem> {
        macro_rules! numbers {
            ($variant:ident $t:ty) => {{
                let bytes = self.take((count * size_of::<$t>()) as u64, what)?;
                let chunks = bytes.chunks_exact(size_of::<$t>());
                let number = |b: &[u8]| <$t>::from_le_bytes(b.try_into().expect("chunked"));
                Array::$variant(chunks.map(number).collect())
            }};
        }
        Ok(match kind {
            Kind::U8 => numbers!(U8 u8),
            Kind::I8 => numbers!(I8 i8),
            Kind::U16 => numbers!(U16 u16),
            Kind::I16 => numbers!(I16 i16),
            Kind::U32 => numbers!(U32 u32),
            Kind::I32 => numbers!(I32 i32),
            Kind::F32 => numbers!(F32 f32),
            Kind::U64 => numbers!(U64 u64),
            Kind::I64 => numbers!(I64 i64),
            Kind::F64 => numbers!(F64 f64),
            Kind::Bool => {
                let bytes = self.take(count as u64, what)?;
                if let Some(bad) = bytes.iter().find(|b| **b > 1) {
                    let problem = format!("{what} is a bool of {bad}, neither 0 nor 1");
                    return Err(Problem::corrupt(problem));
                }
                Array::Bool(bytes.iter().map(|b| *b == 1).collect())
            }
            Kind::String => {
                let mut texts = Vec::with_capacity(count.min(RESERVED));
                for _ in 0..count {
                    texts.push(self.string(what)?.to_owned());
                }
                Array::String(texts)
            }
        })
    }
}

fn scalar(id: u32, key: &str, of: &str) -> Result<Kind, Problem> {
    Kind::from_id(id).ok_or_else(|| {
        Problem::corrupt(format!(
            "key '{key}' is {of} of type {id}, which does not exist"
        ))
    })
}
