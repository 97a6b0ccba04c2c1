//! Lines out of the agent's bytes. Pure: no input or output.
//!
//! `line = [0xff] ‖ JSON ‖ LF`. The byte 0xff is in no UTF-8 text, so wherever it stands a new line begins, and what was
//! before it was cut off.

/// Longest line that we take from an agent: its longest answer, the output of a program, is bounded by us.
pub(super) const MAX_LINE_BYTES: usize = 4 << 20;

/// One line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A line without its ends.
    Text {
        /// Whether 0xff stood before it.
        delimited: bool,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// A line that is longer than any that we take; its bytes are dropped.
    TooLong,
}

/// What has arrived and was not taken yet.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// Bytes that were not looked at.
    waiting: Vec<u8>,
    /// The line so far.
    line: Vec<u8>,
    delimited: bool,
    too_long: bool,
}

impl Lines {
    /// Adds bytes. Take all lines before the next ones are added: that bounds what waits.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.waiting.extend_from_slice(bytes);
    }

    /// The next whole line, if there is one.
    pub(super) fn next(&mut self) -> Option<Line> {
        let mut taken = 0;
        let mut found = None;
        while found.is_none() && taken < self.waiting.len() {
            let rest = &self.waiting[taken..];
            let end = rest.iter().position(|b| matches!(b, b'\n' | 0xff));
            let text = &rest[..end.unwrap_or(rest.len())];
            if self.line.len() + text.len() > MAX_LINE_BYTES {
                self.too_long = true;
                self.line = Vec::new();
            } else if !self.too_long {
                self.line.extend_from_slice(text);
            }
            taken += text.len();
            match end.map(|at| rest[at]) {
                Some(b'\n') => {
                    taken += 1;
                    found = self.finish();
                }
                Some(_) => {
                    taken += 1;
                    *self = Self { waiting: std::mem::take(&mut self.waiting), delimited: true, ..Self::default() };
                }
                None => {}
            }
        }
        self.waiting.drain(..taken);
        found
    }

    /// Ends the line so far; an empty one is none.
    fn finish(&mut self) -> Option<Line> {
        let bytes = std::mem::take(&mut self.line);
        let (delimited, too_long) = (std::mem::take(&mut self.delimited), std::mem::take(&mut self.too_long));
        if too_long {
            return Some(Line::TooLong);
        }
        (delimited || !bytes.trim_ascii().is_empty()).then_some(Line::Text { delimited, bytes })
    }
}

/// The beginning of what was said, for a message.
pub(super) fn excerpt(bytes: &[u8]) -> String {
    const SHOWN: usize = 80;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN)]);
    let dots = if bytes.len() > SHOWN { "…" } else { "" };
    format!("{:?}{dots}", text.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(delimited: bool, bytes: &[u8]) -> Line {
        Line::Text { delimited, bytes: bytes.to_vec() }
    }

    fn all(pieces: &[&[u8]]) -> Vec<Line> {
        let mut lines = Lines::default();
        let mut out = vec![];
        for piece in pieces {
            lines.push(piece);
            out.extend(std::iter::from_fn(|| lines.next()));
        }
        out
    }

    #[test]
    fn a_delimiter_cuts_off_what_was_before_it() {
        assert_eq!(
            all(&[b"{\"a\":1}\r\n\n{\"re", b"\xff{}\n{}\n"]),
            [text(false, b"{\"a\":1}\r"), text(true, b"{}"), text(false, b"{}")]
        );
        assert_eq!(all(&[b"half \xff", b"\xff", b"x\n"]), [text(true, b"x")]);
    }

    #[test]
    fn a_long_line_is_dropped_and_the_next_one_is_not() {
        let long = vec![b'x'; MAX_LINE_BYTES - 1];
        assert_eq!(all(&[&long, b"y\n"]).len(), 1);
        assert_eq!(all(&[&long, b"yz", &long, b"\n{}\n"]), [Line::TooLong, text(false, b"{}")]);
        assert_eq!(all(&[&long, b"yz\xff{}\n"]), [text(true, b"{}")]);
    }

    proptest! {
        /// Any bytes in any pieces: the same lines as in one piece, none with a line's end or a delimiter in it.
        #[test]
        fn pieces_do_not_matter(
            bytes in prop::collection::vec(prop_oneof![Just(b'\n'), Just(0xff), any::<u8>()], 0..200),
            cuts in prop::collection::vec(0usize..200, 0..8),
        ) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|c| c.min(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort();
            let pieces: Vec<_> = cuts.windows(2).map(|c| &bytes[c[0]..c[1]]).collect();
            let lines = all(&pieces);
            prop_assert_eq!(&lines, &all(&[&bytes]));
            for line in lines {
                let Line::Text { bytes, .. } = line else { panic!("too long") };
                prop_assert!(!bytes.contains(&b'\n') && !bytes.contains(&0xff));
            }
        }
    }
}
