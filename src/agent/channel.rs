//! The channel: connecting, getting into step, one command at a time.

use std::io;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout_at};

use super::lines::{Line, Lines, excerpt};
use super::{Address, AgentError};

/// How often a socket is tried whose queue of clients is full.
const CONNECT_AGAIN_AFTER: Duration = Duration::from_millis(20);
const SYNC: &str = "guest-sync-delimited";

/// A connection to an agent, in step with it.
#[derive(Debug)]
pub struct Channel {
    address: Address,
    stream: UnixStream,
    lines: Lines,
    /// Whether the next line is the reply to the next command.
    in_step: bool,
}

impl Channel {
    /// Connects and gets into step, all within `limit`.
    ///
    /// # Errors
    /// [`AgentError::NoSocket`] where nothing listens, [`AgentError::Silent`] where nobody answers.
    pub async fn open(address: &Address, limit: Duration) -> Result<Self, AgentError> {
        let silent = || AgentError::Silent { address: address.clone(), waited: limit };
        let open = async {
            let stream = connect(address).await?;
            let mut this = Self { address: address.clone(), stream, lines: Lines::default(), in_step: false };
            this.sync().await.map(|()| this)
        };
        timeout_at(Instant::now() + limit, open).await.unwrap_or_else(|_| Err(silent()))
    }

    /// Where the agent is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Executes a command. An agent that was given up before is brought into step first.
    pub async fn call(&mut self, command: &str, arguments: Value, limit: Duration) -> Result<Value, AgentError> {
        let deadline = Instant::now() + limit;
        if !self.in_step {
            let silent = AgentError::Silent { address: self.address.clone(), waited: limit };
            timeout_at(deadline, self.sync()).await.unwrap_or(Err(silent))?;
        }
        // Whatever happens until the reply is read, by dropping this future too.
        self.in_step = false;
        let late = AgentError::Late { command: command.to_owned(), limit };
        let reply = timeout_at(deadline, self.exchange(command, arguments)).await.unwrap_or(Err(late));
        self.in_step = matches!(&reply, Ok(_) | Err(AgentError::Refused { .. }));
        reply
    }

    async fn exchange(&mut self, command: &str, arguments: Value) -> Result<Value, AgentError> {
        let request = match arguments.as_object().is_some_and(serde_json::Map::is_empty) {
            true => json!({"execute": command}),
            false => json!({"execute": command, "arguments": arguments}),
        };
        self.write(command, format!("{request}\n").as_bytes()).await?;
        match self.line(command).await? {
            Line::Text { bytes, .. } => reply(command, &bytes),
            Line::TooLong => {
                Err(AgentError::Garbage { command: command.to_owned(), found: "a line without end".into() })
            }
        }
    }

    /// Reads away all that is stale.
    async fn sync(&mut self) -> Result<(), AgentError> {
        // The agent's numbers are signed.
        let mut number = [0; 8];
        getrandom::fill(&mut number).map_err(|e| self.closed(SYNC, e.to_string()))?;
        let number = i64::from_le_bytes(number) >> 12;
        let request = json!({"execute": SYNC, "arguments": {"id": number}});
        let line = [b"\xff".as_slice(), request.to_string().as_bytes(), b"\n"].concat();
        self.write(SYNC, &line).await?;
        loop {
            // The agent's complaint of the 0xff, answers to who was here before, half a line: none of it is for us.
            if let Line::Text { delimited: true, bytes } = self.line(SYNC).await?
                && reply(SYNC, &bytes).is_ok_and(|value| value == json!(number))
            {
                self.in_step = true;
                return Ok(());
            }
        }
    }

    async fn line(&mut self, command: &str) -> Result<Line, AgentError> {
        loop {
            if let Some(line) = self.lines.next() {
                return Ok(line);
            }
            let mut buffer = vec![0; 16 << 10];
            match self.stream.read(&mut buffer).await {
                Ok(0) => return Err(self.closed(command, "the other end is gone".into())),
                Ok(n) => self.lines.push(&buffer[..n]),
                Err(e) => return Err(self.closed(command, e.to_string())),
            }
        }
    }

    async fn write(&mut self, command: &str, bytes: &[u8]) -> Result<(), AgentError> {
        self.stream.write_all(bytes).await.map_err(|e| self.closed(command, e.to_string()))
    }

    fn closed(&self, command: &str, reason: String) -> AgentError {
        AgentError::Closed { address: self.address.clone(), command: command.to_owned(), reason }
    }
}

async fn connect(address: &Address) -> Result<UnixStream, AgentError> {
    loop {
        match UnixStream::connect(&address.0).await {
            Ok(stream) => return Ok(stream),
            // More clients than QEMU's backlog are waiting already.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => sleep(CONNECT_AGAIN_AFTER).await,
            Err(source) => {
                let address = address.clone();
                return Err(match source.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                        AgentError::NoSocket { address, source }
                    }
                    _ => AgentError::Unreachable { address, source },
                });
            }
        }
    }
}

/// What a line says of a command.
fn reply(command: &str, line: &[u8]) -> Result<Value, AgentError> {
    let garbage = || AgentError::Garbage { command: command.to_owned(), found: excerpt(line) };
    let mut value: Value = serde_json::from_slice(line).map_err(|_| garbage())?;
    if let Some(value) = value.get_mut("return") {
        return Ok(value.take());
    }
    let word = |name: &str| value["error"][name].as_str().map(str::to_owned);
    let (class, desc) = word("class").zip(word("desc")).ok_or_else(garbage)?;
    Err(AgentError::Refused { command: command.to_owned(), class, desc })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_line_is_a_reply_or_an_error(
            line in prop_oneof![
                "\\{\"(return|error)\":(\\{\"(class|desc)\":\"a\",\"desc\":(1|\"b\")\\}|[0-9]{1,30}|null|\\[\\])\\}?",
                "[ -~]{0,40}"
            ],
        ) {
            let _ = reply("x", line.as_bytes());
        }
    }
}
