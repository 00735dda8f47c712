//! Frames: length (u32, little endian), CRC-32 (IEEE) of the body (u32, little endian), body.
//!
//! The decoder buffers only bytes that arrived, so a hostile length costs the sender, not the reader: memory is at
//! most one frame bound plus the last piece fed.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

/// Bytes before the body.
pub const HEADER_BYTES: usize = 8;

/// Default bound of a frame's body: 1 MiB.
pub const MAX_BODY_BYTES: usize = 1 << 20;

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length exceeds the bound: a hostile peer, or bytes that are not frames.
    #[error("frame of {body_bytes} bytes exceeds the bound of {max_bytes} bytes")]
    TooLong {
        /// Length the header claims, bytes.
        body_bytes: u64,
        /// The bound, bytes.
        max_bytes: u64,
    },
    /// A length of zero: no message is empty, and a run of zero bytes must not read as frames.
    #[error("frame without a body")]
    Empty,
    /// The body is not what was written.
    #[error("frame checksum is {found:#010x}, expected {expected:#010x}: the bytes were damaged")]
    Checksum {
        /// CRC in the header.
        expected: u32,
        /// CRC of the body.
        found: u32,
    },
}

/// Appends one frame with this body.
///
/// # Errors
/// When the body is empty or longer than [`MAX_BODY_BYTES`].
pub fn encode(body: &[u8], out: &mut BytesMut) -> Result<(), FrameError> {
    encode_bounded(body, MAX_BODY_BYTES, out)
}

/// Appends one frame with this body under another bound.
///
/// # Errors
/// When the body is empty or longer than `max_body_bytes`.
pub fn encode_bounded(body: &[u8], max_body_bytes: usize, out: &mut BytesMut) -> Result<(), FrameError> {
    let length = checked_length(body.len() as u64, max_body_bytes)?;
    out.reserve(HEADER_BYTES + body.len());
    out.put_u32_le(length);
    out.put_u32_le(crc32fast::hash(body));
    out.put_slice(body);
    Ok(())
}

/// One frame holding an encoded message.
///
/// # Errors
/// When the message is empty or encodes to more than [`MAX_BODY_BYTES`].
pub fn encode_message(message: &impl Message) -> Result<Bytes, FrameError> {
    let mut out = BytesMut::new();
    encode(&message.encode_to_vec(), &mut out)?;
    Ok(out.freeze())
}

fn checked_length(body_bytes: u64, max_body_bytes: usize) -> Result<u32, FrameError> {
    if body_bytes == 0 {
        return Err(FrameError::Empty);
    }
    let max_bytes = (max_body_bytes as u64).min(u64::from(u32::MAX));
    match u32::try_from(body_bytes) {
        Ok(length) if body_bytes <= max_bytes => Ok(length),
        _ => Err(FrameError::TooLong {
            body_bytes,
            max_bytes,
        }),
    }
}

/// Takes bytes in any pieces and gives frame bodies. After an error it gives that error again: what follows damaged
/// bytes cannot be trusted.
#[derive(Debug)]
pub struct Decoder {
    buffer: BytesMut,
    max_body_bytes: usize,
    consumed_bytes: u64,
    failed: Option<FrameError>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new(MAX_BODY_BYTES)
    }
}

impl Decoder {
    /// A decoder that refuses bodies longer than `max_body_bytes`.
    #[must_use]
    pub fn new(max_body_bytes: usize) -> Self {
        Self {
            buffer: BytesMut::new(),
            max_body_bytes,
            consumed_bytes: 0,
            failed: None,
        }
    }

    /// Adds bytes that arrived. Call [`Decoder::next_body`] until it gives `None` before adding more.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// The next whole body; `None` when more bytes are needed.
    ///
    /// # Errors
    /// When the bytes are not a frame.
    pub fn next_body(&mut self) -> Result<Option<Bytes>, FrameError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = self.take_body();
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            self.buffer = BytesMut::new();
        }
        result
    }

    fn take_body(&mut self) -> Result<Option<Bytes>, FrameError> {
        let mut header = self.buffer.as_ref();
        if header.len() < HEADER_BYTES {
            return Ok(None);
        }
        let length = checked_length(u64::from(header.get_u32_le()), self.max_body_bytes)? as usize;
        let expected = header.get_u32_le();
        if self.buffer.len() - HEADER_BYTES < length {
            return Ok(None);
        }
        self.buffer.advance(HEADER_BYTES);
        let body = self.buffer.split_to(length).freeze();
        let found = crc32fast::hash(&body);
        if found != expected {
            return Err(FrameError::Checksum { expected, found });
        }
        self.consumed_bytes += (HEADER_BYTES + length) as u64;
        Ok(Some(body))
    }

    /// Bytes fed and not yet given out: a torn frame when nothing more comes.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Bytes of all whole frames given out: where a store cuts off a torn tail.
    #[must_use]
    pub const fn consumed_bytes(&self) -> u64 {
        self.consumed_bytes
    }
}
