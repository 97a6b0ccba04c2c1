//! What fuzzing runs: any bytes as what a peer sends, to either end. Must neither panic nor hang, whatever they are.

use super::frame::{DATA_HEAD_BYTES, HEAD_BYTES, Head, Kind, MAX_REPLY_BYTES, Place, ZERO_BYTES, decode_control};
use super::message::{Reply, Request};

/// Frames one behind the other. A wrong checksum is passed over: behind it is what a peer may send on purpose.
pub fn frames(bytes: &[u8]) {
    let mut rest = bytes;
    while let Some((head, body)) = rest.split_first_chunk::<HEAD_BYTES>() {
        let Ok((head, _)) = Head::decode(head, MAX_REPLY_BYTES) else { return };
        let Some((payload, next)) = body.split_at_checked(head.payload_bytes as usize) else { return };
        match head.kind {
            Kind::Control => {
                let _ = decode_control::<Request>(payload);
                let _ = decode_control::<Reply>(payload);
            }
            Kind::Data => {
                let place = payload.first_chunk::<DATA_HEAD_BYTES>().map(|p| Place::decode_data(p, head.payload_bytes));
                if let Some(Ok(place)) = place {
                    assert_eq!(place.extent.len_bytes as usize, payload.len() - DATA_HEAD_BYTES);
                }
            }
            Kind::Zero | Kind::Same => {
                let _ = payload.first_chunk::<ZERO_BYTES>().map(Place::decode_zero);
            }
            Kind::Digests | Kind::Alive => {}
        }
        rest = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A frame of this kind; its checksum is not looked at.
    fn frame(kind: Kind, payload: &[u8]) -> Vec<u8> {
        let mut frame = (payload.len() as u32).to_le_bytes().to_vec();
        frame.extend([kind as u8, 0, 0, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    proptest! {
        #[test]
        fn mutated_frames_never_panic(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let request = br#"{"request":"begin","vm":"v","since":{},"chunk_bytes":65536,"checkpoint":true}"#;
            let failed = br#"{"reply":"failed","code":"busy","message":"m"}"#;
            let data = [&[0; 12][..], &[4, 0, 0, 0], b"abcd"].concat();
            let zero = [&[0; 16][..], &[0, 0, 1, 0, 0, 0, 0, 0]].concat();
            let mut bytes = [
                frame(Kind::Control, request), frame(Kind::Data, &data), frame(Kind::Zero, &zero),
                frame(Kind::Alive, b""), frame(Kind::Control, failed),
            ].concat();
            frames(&bytes);
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            frames(&bytes);
        }
    }
}
