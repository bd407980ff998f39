//! TensorBoard event files: a TFRecord file of `Event` protocol buffers, of which only what scalars need is written.
//!
//! # Source
//! The wire format of protocol buffers; `tensorflow/core/util/event.proto`, `framework/summary.proto` (field numbers)
//! and `lib/io/record_writer.h` (framing); CRC-32C is that of RFC 3720.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// An event file being written.
#[derive(Debug)]
pub struct EventWriter {
    file: File,
    path: PathBuf,
}

impl EventWriter {
    /// Starts a new event file in `folder`, which is created.
    ///
    /// `wall_time` is the time in seconds since 1970. For a run resumed after `last_step`, TensorBoard is told to
    /// forget what earlier files in the folder say about later steps.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be created.
    pub fn create(folder: &Path, wall_time: f64, last_step: Option<u64>) -> Result<Self> {
        let created = std::fs::create_dir_all(folder);
        created.map_err(|error| Error::io("create", folder, error))?;
        let (path, file) = new_file(folder, wall_time)?;
        let mut writer = Self { file, path };
        let mut event = Message::event(wall_time, 0);
        event.bytes(3, b"brain.Event:2");
        writer.record(&event.0)?;
        if let Some(last) = last_step {
            let mut start = Message::default();
            start.varint(1, 1);
            let mut event = Message::event(wall_time, last + 1);
            event.bytes(7, &start.0);
            writer.record(&event.0)?;
        }
        Ok(writer)
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends the scalars of a step.
    ///
    /// # Errors
    /// [`Error::Io`] when they cannot be written.
    pub fn write(&mut self, step: u64, wall_time: f64, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in values {
            let mut scalar = Message::default();
            scalar.bytes(1, tag.as_bytes());
            scalar.float(2, *value as f32);
            summary.bytes(1, &scalar.0);
        }
        let mut event = Message::event(wall_time, step);
        event.bytes(5, &summary.0);
        self.record(&event.0)
    }

    /// Length, checksum of the length, data, checksum of the data.
    fn record(&mut self, data: &[u8]) -> Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + 16);
        record.extend_from_slice(&length);
        record.extend_from_slice(&masked_crc(&length).to_le_bytes());
        record.extend_from_slice(data);
        record.extend_from_slice(&masked_crc(data).to_le_bytes());
        let written = self.file.write_all(&record);
        written.map_err(|error| Error::io("write", &self.path, error))
    }
}

/// Creates a file whose name TensorBoard recognizes and sorts behind the earlier ones.
fn new_file(folder: &Path, wall_time: f64) -> Result<(PathBuf, File)> {
    let mut serial = 0;
    loop {
        let name = format!(
            "events.out.tfevents.{:010}.windlass.{serial}",
            wall_time as u64
        );
        let path = folder.join(name);
        match OpenOptions::new().append(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => serial += 1,
            Err(error) => return Err(Error::io("create", &path, error)),
        }
    }
}

/// A protocol buffer message.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    /// An `Event` with its time (field 1) and step (field 2).
    fn event(wall_time: f64, step: u64) -> Self {
        let mut event = Self::default();
        event.key(1, 1);
        event.0.extend_from_slice(&wall_time.to_le_bytes());
        event.varint(2, step);
        event
    }

    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.raw_varint(value);
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.raw_varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }
}

/// CRC-32C of every byte value: reflected polynomial 0x82f63b78.
const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ 0x82f6_3b78
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

fn crc32c(data: &[u8]) -> u32 {
    let step = |crc: u32, &byte: &u8| crc >> 8 ^ TABLE[((crc ^ u32::from(byte)) & 0xff) as usize];
    !data.iter().fold(!0, step)
}

/// The checksum as TFRecord stores it: rotated and shifted, so that checksums of checksums stay useful.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CRC-32C bit by bit, from the polynomial in its usual (not reflected) order.
    fn slow_crc(data: &[u8]) -> u32 {
        let mut crc = !0u32;
        for byte in data {
            crc ^= u32::from(byte.reverse_bits()) << 24;
            for _ in 0..8 {
                crc = if crc >> 31 == 1 {
                    crc << 1 ^ 0x1edc_6f41
                } else {
                    crc << 1
                };
            }
        }
        !crc.reverse_bits()
    }

    fn varint(data: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = data[0];
            *data = &data[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }

    /// Fields of a message: number and content (varints as eight bytes).
    fn fields(mut data: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let mut fields = Vec::new();
        while !data.is_empty() {
            let key = varint(&mut data);
            let length = match key & 7 {
                0 => {
                    let value = varint(&mut data);
                    fields.push((key >> 3, value.to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                2 => varint(&mut data) as usize,
                5 => 4,
                other => panic!("wire type {other}"),
            };
            fields.push((key >> 3, data[..length].to_vec()));
            data = &data[length..];
        }
        fields
    }

    /// The events of a file, with every checksum recomputed.
    fn events(path: &Path) -> Vec<Vec<(u64, Vec<u8>)>> {
        let content = std::fs::read(path).unwrap();
        let (mut data, mut events) = (content.as_slice(), Vec::new());
        while !data.is_empty() {
            let length = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
            for part in [0..8, 12..12 + length] {
                let stored = u32::from_le_bytes(data[part.end..part.end + 4].try_into().unwrap());
                let crc = stored.wrapping_sub(0xa282_ead8).rotate_left(15);
                assert_eq!(crc, slow_crc(&data[part]));
            }
            events.push(fields(&data[12..12 + length]));
            data = &data[16 + length..];
        }
        events
    }

    #[test]
    fn events_can_be_read_back_and_checked() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(slow_crc(b"123456789"), 0xe306_9283);
        let folder = std::env::temp_dir().join(format!("windlass-events-{}", std::process::id()));
        let mut writer = EventWriter::create(&folder, 1.75e9, None).unwrap();
        let long = "x".repeat(300);
        writer
            .write(7, 1.5, &[("loss", 0.1), (&long, -2.0)])
            .unwrap();
        writer.write(1 << 40, 2.5, &[("loss", f64::NAN)]).unwrap();
        let read = events(writer.path());
        assert_eq!(read[0][2], (3, b"brain.Event:2".to_vec()));
        assert_eq!(read[1][0], (1, 1.5f64.to_le_bytes().to_vec()));
        assert_eq!(read[1][1], (2, 7u64.to_le_bytes().to_vec()));
        let scalars = fields(&read[1][2].1);
        assert_eq!(read[1][2].0, 5);
        let scalar = |tag: &str, value: f32| {
            vec![
                (1, tag.as_bytes().to_vec()),
                (2, value.to_le_bytes().to_vec()),
            ]
        };
        assert_eq!(fields(&scalars[0].1), scalar("loss", 0.1));
        assert_eq!(fields(&scalars[1].1), scalar(&long, -2.0));
        assert_eq!(read[2][1], (2, (1u64 << 40).to_le_bytes().to_vec()));

        let resumed = EventWriter::create(&folder, 1.75e9, Some(6)).unwrap();
        assert!(resumed.path() > writer.path());
        let start = &events(resumed.path())[1];
        assert_eq!(
            start[1..],
            [(2, 7u64.to_le_bytes().to_vec()), (7, vec![8, 1])]
        );
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
