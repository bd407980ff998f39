//! What a rank tells all others before a collective: its call, so that ranks in different ones notice before data flows.

use crate::datum::Element;
use crate::request::{Call, Collective};

/// Bytes of a tag that travel; longer ones are cut, on all ranks alike.
const TAG_BYTES: usize = 200;

/// Bytes that the header of a world of this size needs at most.
pub fn capacity(size: usize) -> usize {
    3 + TAG_BYTES + 4 + 16 * size
}

/// As much of a tag as travels.
pub fn cut(tag: &str) -> &str {
    &tag[..tag.floor_char_boundary(TAG_BYTES)]
}

/// A message to another rank.
pub enum Header {
    /// It comes to this collective.
    Call(Call),
    /// It will come to no further one; whether its thread panicked.
    Leaving { panicked: bool },
}

impl Header {
    /// Writes it to memory of [`capacity`] and returns its length.
    pub fn write(&self, bytes: &mut [u8]) -> usize {
        let mut written = Vec::with_capacity(bytes.len());
        match self {
            Header::Leaving { panicked } => written.extend([LEAVING, u8::from(*panicked)]),
            Header::Call(call) => {
                let tag = cut(&call.tag).as_bytes();
                let kind = COLLECTIVES.iter().position(|kind| *kind == call.collective);
                let element = ELEMENTS.iter().position(|kind| *kind == call.element);
                let index = |found: Option<usize>| found.expect("in the list of all") as u8;
                written.extend([index(kind), index(element), tag.len() as u8]);
                written.extend(tag);
                written.extend((call.numbers.len() as u32).to_le_bytes());
                let numbers = call.numbers.iter();
                written.extend(numbers.flat_map(|&number| (number as u64).to_le_bytes()));
            }
        }
        bytes[..written.len()].copy_from_slice(&written);
        written.len()
    }

    /// Reads one back from its bytes; none if they are not a header.
    pub fn read(bytes: &[u8]) -> Option<Header> {
        let (&first, rest) = bytes.split_first()?;
        if first == LEAVING {
            let panicked = *rest.first()? != 0;
            return Some(Header::Leaving { panicked });
        }
        let (&element, rest) = rest.split_first()?;
        let (&length, rest) = rest.split_first()?;
        let (tag, rest) = rest.split_at_checked(length.into())?;
        let (count, numbers) = rest.split_first_chunk()?;
        let numbers = numbers.get(..8 * u32::from_le_bytes(*count) as usize)?;
        let numbers = numbers.chunks_exact(8).map(|bytes| {
            let number = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
            number as usize
        });
        Some(Header::Call(Call {
            collective: *COLLECTIVES.get(usize::from(first))?,
            element: *ELEMENTS.get(usize::from(element))?,
            tag: String::from_utf8(tag.to_vec()).ok()?,
            numbers: numbers.collect(),
        }))
    }
}

const LEAVING: u8 = 255;

const COLLECTIVES: [Collective; 7] = [
    Collective::Barrier,
    Collective::AllGather,
    Collective::ReduceScatter,
    Collective::AllReduce,
    Collective::Broadcast,
    Collective::AllToAll,
    Collective::Collect,
];

const ELEMENTS: [Element; 11] = [
    Element::F32,
    Element::F64,
    Element::Bf16,
    Element::F16,
    Element::U8,
    Element::I8,
    Element::I16,
    Element::I32,
    Element::I64,
    Element::U32,
    Element::U64,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_come_back_from_their_bytes() {
        let long = "é".repeat(200);
        for (at, collective) in COLLECTIVES.into_iter().enumerate() {
            for element in ELEMENTS {
                for tag in ["", "gather layers.3", &long] {
                    let numbers = [at, usize::MAX, 7][..at % 4].to_vec();
                    let call = Call {
                        collective,
                        element,
                        tag: cut(tag).to_owned(),
                        numbers,
                    };
                    let mut bytes = vec![9; capacity(2)];
                    let length = Header::Call(call.clone()).write(&mut bytes);
                    let Some(Header::Call(read)) = Header::read(&bytes) else {
                        panic!("{call}");
                    };
                    assert_eq!((read.collective, read.element), (collective, element));
                    assert_eq!((read.tag, read.numbers), (call.tag, call.numbers));
                    // Cut short anywhere, it is no header.
                    for length in 0..length {
                        assert!(Header::read(&bytes[..length]).is_none());
                    }
                }
            }
        }
        for panicked in [false, true] {
            let mut bytes = [0; 2];
            Header::Leaving { panicked }.write(&mut bytes);
            let read = Header::read(&bytes);
            assert!(matches!(read, Some(Header::Leaving { panicked: p }) if p == panicked));
        }
    }
}
