//! What fuzzing runs: any bytes as what a peer sends, to either end. Must neither panic nor hang, whatever they are.

use super::frame::{
    DATA_HEAD_BYTES, HEAD_BYTES, Head, Kind, MAX_REPLY_BYTES, PACKED_HEAD_BYTES, Place, ZERO_BYTES, decode_control,
};
use super::message::{Reply, Request};
use crate::codec::{Packed, Unpacker};
use crate::limits::MIN_CHUNK_BYTES;

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
            Kind::Packed => packed(payload),
            Kind::Zero | Kind::Same => {
                let _ = payload.first_chunk::<ZERO_BYTES>().map(Place::decode_zero);
            }
            Kind::Digests | Kind::Part | Kind::Alive => {}
        }
        rest = next;
    }
}

/// A packed payload, as far as a client goes with it: to the chunks themselves.
fn packed(payload: &[u8]) {
    let Some((fixed, bytes)) = payload.split_first_chunk::<PACKED_HEAD_BYTES>() else { return };
    let Ok((place, pieces)) = Place::decode_packed(fixed, payload.len() as u32) else { return };
    let Some(packed) = Packed::new(place.extent.len_bytes as u32, pieces, bytes.to_vec().into()) else {
        panic!("what the frame allows can be had");
    };
    if !packed.is_in_chunks_of(MIN_CHUNK_BYTES) {
        return;
    }
    let Ok(mut unpacker) = Unpacker::new() else { return };
    let (mut at, mut left) = (0, packed.raw_len() as usize);
    for piece in packed.pieces() {
        let mut out = vec![0; left.min(MIN_CHUNK_BYTES as usize)];
        let _ = unpacker.unpack(piece.codec, &bytes[at..at + piece.len as usize], &mut out);
        (at, left) = (at + piece.len as usize, left - out.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Codec, Packer};
    use crate::wire::frame::Encoded;
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
            let join = br#"{"request":"join","token":"00112233445566778899aabbccddeeff"}"#;
            let joinable = br#"{"reply":"joinable","token":"00112233445566778899aabbccddeeff","more":3}"#;
            let part = [&7u64.to_le_bytes()[..], b"some of a frame"].concat();
            let zero = [&[0; 16][..], &[0, 0, 1, 0, 0, 0, 0, 0]].concat();
            let packed = |codec| {
                let raw: Vec<u8> = (0..70_000u32).map(|i| (i / 999) as u8).collect();
                let mut into = vec![0; raw.len()];
                let (pieces, used) =
                    Packer::new(1).unwrap().pack_all(codec, &raw, MIN_CHUNK_BYTES as usize, &mut into).unwrap();
                let packed = Packed::new(raw.len() as u32, pieces, into[..used].to_vec().into()).unwrap();
                let frame = Encoded::packed(0, 65536, &packed).unwrap();
                [frame.head(), frame.body()].concat()
            };
            let mut bytes = [
                frame(Kind::Control, request), frame(Kind::Data, &data), frame(Kind::Zero, &zero),
                packed(Codec::Zstd), packed(Codec::Lz4), frame(Kind::Alive, b""), frame(Kind::Control, failed),
                frame(Kind::Control, join), frame(Kind::Control, joinable), frame(Kind::Part, &part), frame(Kind::Part, &[1; 8]),
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
