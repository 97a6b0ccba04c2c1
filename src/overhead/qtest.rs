//! qtest: the protocol by which QEMU's own tests reach a machine's ports and registers, over a unix socket. It is part of every
//! QEMU, whatever the accelerator.
//!
//! A command is a line, the answer is a line: `OK` and perhaps a number. See QEMU's `docs/devel/testing/qtest.rst`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::error::DriverError;

/// Longest answer to the commands that are used here.
const MAX_LINE_BYTES: u64 = 256;
/// Longest wait for an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Answers that are left unread at most; they are three bytes each.
const MAX_OWED: usize = 64;

/// A connection.
#[derive(Debug)]
pub struct Qtest {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    /// Answers that nobody has waited for yet.
    owed: usize,
}

impl Qtest {
    /// Connects to `-qtest unix:PATH,server=on`.
    pub fn connect(path: &Path) -> Result<Self, DriverError> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        stream.set_write_timeout(Some(ANSWER_WITHIN))?;
        let reader = BufReader::new(stream.try_clone()?);
        Ok(Self { stream, reader, owed: 0 })
    }

    fn answer(&mut self) -> Result<u64, DriverError> {
        let mut line = String::new();
        let read = (&mut self.reader).take(MAX_LINE_BYTES).read_line(&mut line)?;
        let mut words = line.split_whitespace();
        match (read, words.next()) {
            (0, _) => Err(DriverError::Gone),
            (_, Some("OK")) => {
                let number = words.next().unwrap_or("0");
                let number = number
                    .strip_prefix("0x")
                    .map_or_else(|| number.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok());
                number.ok_or_else(|| DriverError::Answer(line.trim_end().to_owned()))
            }
            _ => Err(DriverError::Answer(line.trim_end().to_owned())),
        }
    }

    /// Takes the answers that are owed.
    pub fn settle(&mut self) -> Result<(), DriverError> {
        while self.owed > 0 {
            self.answer()?;
            self.owed -= 1;
        }
        Ok(())
    }

    /// Says something and goes on: its answer is taken some time later.
    pub fn tell(&mut self, line: &str) -> Result<(), DriverError> {
        if self.owed >= MAX_OWED {
            self.settle()?;
        }
        self.stream.write_all(line.as_bytes())?;
        self.owed += 1;
        Ok(())
    }

    /// A command's number; 0 where it has none.
    pub fn call(&mut self, line: &str) -> Result<u64, DriverError> {
        self.settle()?;
        self.stream.write_all(format!("{line}\n").as_bytes())?;
        self.answer()
    }

    /// Reads the 32 bits at an aligned place of a PCI function's configuration.
    pub fn pci_read(&mut self, slot: u32, place: u32) -> Result<u32, DriverError> {
        self.call(&format!("outl 0xcf8 {:#x}", 0x8000_0000 | slot << 11 | (place & 0xfc)))?;
        Ok(self.call("inl 0xcfc")? as u32)
    }

    /// Writes them.
    pub fn pci_write(&mut self, slot: u32, place: u32, value: u32) -> Result<(), DriverError> {
        self.call(&format!("outl 0xcf8 {:#x}", 0x8000_0000 | slot << 11 | (place & 0xfc)))?;
        self.call(&format!("outl 0xcfc {value:#x}")).map(drop)
    }
}
