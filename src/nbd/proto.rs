//! Numbers and bounds of the NBD protocol (proto.md, "Values" and "Protocol phases").

/// First word of a server ("Newstyle negotiation"): `NBDMAGIC`.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of a newstyle server, and first word of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Second word of an oldstyle server ("Oldstyle negotiation"), which we do not talk to.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First word of an option's reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First word of a request ("Request message").
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a simple reply ("Simple reply message").
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First word of a chunk of a structured reply ("Structured reply chunk message").
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flag (both ways): fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag (both ways): no 124 zero bytes after `EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Option: choose the export and start transmitting; the old way, whose only refusal is to hang up.
pub const OPT_EXPORT_NAME: u32 = 1;
/// Option: end the negotiation.
pub const OPT_ABORT: u32 = 2;
/// Option: list the exports.
pub const OPT_LIST: u32 = 3;
/// Option: what an export is.
pub const OPT_INFO: u32 = 6;
/// Option: choose the export and start transmitting.
pub const OPT_GO: u32 = 7;
/// Option: structured replies, please.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: list metadata contexts.
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// Option: choose metadata contexts.
pub const OPT_SET_META_CONTEXT: u32 = 10;

/// Option reply: done.
pub const REP_ACK: u32 = 1;
/// Option reply: one export of a list.
pub const REP_SERVER: u32 = 2;
/// Option reply: one piece of information about an export.
pub const REP_INFO: u32 = 3;
/// Option reply: one metadata context that was chosen.
pub const REP_META_CONTEXT: u32 = 4;
/// Set in every error reply to an option.
pub const REP_FLAG_ERROR: u32 = 1 << 31;
/// Option error: unknown option.
pub const REP_ERR_UNSUP: u32 = REP_FLAG_ERROR + 1;
/// Option error: forbidden by the server's configuration.
pub const REP_ERR_POLICY: u32 = REP_FLAG_ERROR + 2;
/// Option error: the option's data makes no sense, or comes at the wrong time.
pub const REP_ERR_INVALID: u32 = REP_FLAG_ERROR + 3;
/// Option error: TLS has to be started first.
pub const REP_ERR_TLS_REQD: u32 = REP_FLAG_ERROR + 5;
/// Option error: no such export.
pub const REP_ERR_UNKNOWN: u32 = REP_FLAG_ERROR + 6;
/// Option error: the server is shutting down.
pub const REP_ERR_SHUTDOWN: u32 = REP_FLAG_ERROR + 7;

/// Information: size and transmission flags.
pub const INFO_EXPORT: u16 = 0;
/// Information: the export's name.
pub const INFO_NAME: u16 = 1;
/// Information: a description for people.
pub const INFO_DESCRIPTION: u16 = 2;
/// Information: block sizes.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flag: the other flags mean something.
pub const HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: writes are refused.
pub const READ_ONLY: u16 = 1 << 1;
/// Transmission flag: FLUSH is understood.
pub const SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: TRIM is understood.
pub const SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: WRITE_ZEROES is understood.
pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: the command flag DF is understood.
pub const SEND_DF: u16 = 1 << 7;
/// Transmission flag: several connections see the same.
pub const CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: CACHE is understood.
pub const SEND_CACHE: u16 = 1 << 10;

/// Command: read.
pub const CMD_READ: u16 = 0;
/// Command: write; its data follows it.
pub const CMD_WRITE: u16 = 1;
/// Command: end the session; has no reply.
pub const CMD_DISC: u16 = 2;
/// Command: flush.
pub const CMD_FLUSH: u16 = 3;
/// Command: trim.
pub const CMD_TRIM: u16 = 4;
/// Command: read ahead.
pub const CMD_CACHE: u16 = 5;
/// Command: write zeroes.
pub const CMD_WRITE_ZEROES: u16 = 6;
/// Command: block status.
pub const CMD_BLOCK_STATUS: u16 = 7;

/// Command flag of WRITE_ZEROES: allocate, leave no hole.
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag of READ: the data in one chunk.
pub const CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag of BLOCK_STATUS: one descriptor only.
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;

/// Chunk flag: the last chunk of this reply.
pub const CHUNK_DONE: u16 = 1 << 0;
/// Chunk: nothing.
pub const CHUNK_NONE: u16 = 0;
/// Chunk: offset, data.
pub const CHUNK_OFFSET_DATA: u16 = 1;
/// Chunk: offset, length of zeroes.
pub const CHUNK_OFFSET_HOLE: u16 = 2;
/// Chunk: context id, descriptors.
pub const CHUNK_BLOCK_STATUS: u16 = 5;
/// Set in every error chunk's type.
pub const CHUNK_FLAG_ERROR: u16 = 1 << 15;
/// Chunk: error, message.
pub const CHUNK_ERROR: u16 = CHUNK_FLAG_ERROR + 1;
/// Chunk: error, message, offset.
pub const CHUNK_ERROR_OFFSET: u16 = CHUNK_FLAG_ERROR + 2;

/// Error ("Error values"): not permitted.
pub const EPERM: u32 = 1;
/// Error: the bytes cannot be read.
pub const EIO: u32 = 5;
/// Error: the request makes no sense.
pub const EINVAL: u32 = 22;

/// `base:allocation`: not allocated.
pub const STATE_HOLE: u32 = 1 << 0;
/// `base:allocation`: reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;
/// `qemu:dirty-bitmap:…`: written since the bitmap was made.
pub const STATE_DIRTY: u32 = 1 << 0;

/// Longest string ("Values": export names, context names, messages), in bytes.
pub const MAX_STRING_BYTES: usize = 4096;
/// Longest payload of one option reply: two strings and the words before them.
pub const MAX_OPTION_REPLY_BYTES: usize = 2 * MAX_STRING_BYTES + 64;
/// Longest data of an option that we answer: names and queries of a usual client are a fraction of it.
pub const MAX_OPTION_BYTES: usize = 64 << 10;
/// Most replies to one option; a server with more exports than this cannot be listed.
pub const MAX_OPTION_REPLIES: usize = 4096;
/// Most metadata contexts of a session.
pub const MAX_CONTEXTS: usize = 16;
/// Most descriptors of one block-status chunk (nbdkit sends at most this many, QEMU an eighth of it).
pub const MAX_DESCRIPTORS: usize = 1 << 20;
/// Longest payload of an error chunk: errno, length, message, offset.
pub const MAX_ERROR_PAYLOAD_BYTES: usize = 4 + 2 + MAX_STRING_BYTES + 8;
/// Longest request of commands without payload that we send, in bytes: the largest multiple of 64 KiB in a `u32`.
pub const MAX_REQUEST_BYTES: u64 = (1 << 32) - (64 << 10);
/// Largest payload to ask for when the server names no block sizes ("Block size constraints").
pub const DEFAULT_MAX_BLOCK_BYTES: u32 = 32 << 20;

/// Zero bytes that end the answer to `EXPORT_NAME` unless both sides do without.
pub const EXPORT_NAME_ZEROES: usize = 124;
/// Length of an encoded request.
pub const REQUEST_BYTES: usize = 28;
/// Length of an option's header, and of a simple reply.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Length of an option reply's header.
pub const OPTION_REPLY_HEADER_BYTES: usize = 20;
/// Length of a simple reply, and of the part of a chunk's header that has the same layout up to here.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Length of a chunk's header.
pub const CHUNK_HEADER_BYTES: usize = 20;
