//! Netlink dumps: one request, many messages, every length checked.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
    sockopt,
};

const HEADER: usize = 16;
const DONE: u16 = 3;
const ERROR: u16 = 2;
/// `NLM_F_REQUEST`
const REQUEST: u16 = 0x1;
/// `NLM_F_REQUEST | NLM_F_DUMP`
const REQUEST_DUMP: u16 = REQUEST | 0x300;
/// The kernel writes dumps in pieces of at most 32 KiB.
const BUFFER: usize = 64 << 10;
/// Most pieces of one dump: some 64 MiB.
const MAX_PIECES: usize = 2048;
/// The kernel answers dumps at once; this only keeps a fault from blocking the agent.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Attribute types carry two flag bits.
const TYPE_MASK: u16 = 0x3fff;

/// Why a dump failed.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// A system call failed, or the kernel answered an error.
    #[error("the kernel answered: {0}")]
    System(#[from] Errno),
    /// A message does not hold together.
    #[error("a netlink message is malformed: {0}")]
    Malformed(&'static str),
}

/// A netlink socket.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// `None` is the routing family.
    pub(super) fn open(protocol: Option<Protocol>) -> Result<Self, DumpError> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            protocol,
        )?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(TIMEOUT))?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; BUFFER],
        })
    }

    /// Sends a dump request and gives every payload of `answer` messages to `each`.
    pub(super) fn dump(
        &mut self,
        request: u16,
        body: &[u8],
        answer: u16,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), DumpError> {
        self.send(request, REQUEST_DUMP, body)?;
        for _ in 0..MAX_PIECES {
            if self.receive(answer, &mut each)? {
                return Ok(());
            }
        }
        Err(DumpError::Malformed("the dump does not end"))
    }

    /// Asks for one thing; gives the payload of its `answer` message to `each`.
    pub(super) fn ask(
        &mut self,
        request: u16,
        body: &[u8],
        answer: u16,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), DumpError> {
        self.send(request, REQUEST, body)?;
        let mut answered = false;
        for _ in 0..MAX_PIECES {
            let done = self.receive(answer, &mut |body: &[u8]| {
                answered = true;
                each(body);
            })?;
            if answered || done {
                return Ok(());
            }
        }
        Err(DumpError::Malformed("the question is not answered"))
    }

    fn send(&mut self, kind: u16, flags: u16, body: &[u8]) -> Result<(), DumpError> {
        self.sequence = self.sequence.wrapping_add(1);
        let message = request_message(kind, flags, self.sequence, body);
        sendto(
            &self.socket,
            &message,
            SendFlags::empty(),
            &SocketAddrNetlink::new(0, 0),
        )?;
        Ok(())
    }

    /// Reads one datagram; true when it ends the answer.
    fn receive(&mut self, answer: u16, each: &mut impl FnMut(&[u8])) -> Result<bool, DumpError> {
        let (_, length) = recv(&self.socket, self.buffer.as_mut_slice(), RecvFlags::TRUNC)?;
        let piece = self
            .buffer
            .get(..length)
            .ok_or(DumpError::Malformed("longer than the buffer"))?;
        read_piece(piece, self.sequence, answer, each)
    }
}

fn request_message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend_from_slice(&length.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&sequence.to_ne_bytes());
    message.extend_from_slice(&0_u32.to_ne_bytes());
    message.extend_from_slice(body);
    message
}

/// Reads the messages of one datagram; true when the dump is complete. Messages of an earlier request that was given
/// up are skipped.
fn read_piece(
    mut piece: &[u8],
    sequence: u32,
    answer: u16,
    each: &mut impl FnMut(&[u8]),
) -> Result<bool, DumpError> {
    while !piece.is_empty() {
        let length = u32_at(piece, 0).ok_or(DumpError::Malformed("shorter than a header"))? as usize;
        let kind = u16_at(piece, 4).ok_or(DumpError::Malformed("shorter than a header"))?;
        let number = u32_at(piece, 8).ok_or(DumpError::Malformed("shorter than a header"))?;
        let body = piece
            .get(HEADER..length)
            .ok_or(DumpError::Malformed("its length is wrong"))?;
        if number == sequence {
            match kind {
                DONE => return Ok(true),
                ERROR => return acknowledge(body),
                kind if kind == answer => each(body),
                _ => {}
            }
        }
        piece = piece.get(aligned(length)..).unwrap_or_default();
    }
    Ok(false)
}

fn acknowledge(body: &[u8]) -> Result<bool, DumpError> {
    let code = i32_at(body, 0).ok_or(DumpError::Malformed("an error without a code"))?;
    if code == 0 {
        Ok(true)
    } else {
        Err(DumpError::System(Errno::from_raw_os_error(code.saturating_neg())))
    }
}

/// The attributes of a message, as (type, payload); ends at the first that does not fit.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & TYPE_MASK;
        let payload = bytes.get(4..length)?;
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some((kind, payload))
    })
}

const fn aligned(length: usize) -> usize {
    length.saturating_add(3) & !3
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    Some(i32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// An attribute, padded.
pub(super) fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + payload.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(payload);
    bytes.resize(aligned(bytes.len()), 0);
    bytes
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn message(kind: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = request_message(kind, REQUEST_DUMP, sequence, body);
        bytes.resize(aligned(bytes.len()), 0);
        bytes
    }

    fn read(piece: &[u8]) -> (Result<bool, DumpError>, Vec<Vec<u8>>) {
        let mut bodies = Vec::new();
        let done = read_piece(piece, 7, 20, &mut |body: &[u8]| bodies.push(body.to_vec()));
        (done, bodies)
    }

    #[test]
    fn takes_its_own_answers_until_done() {
        let piece = [
            message(20, 6, b"old"),
            message(20, 7, b"one"),
            message(9, 7, b"other"),
            message(20, 7, b"two"),
        ]
        .concat();
        let (done, bodies) = read(&piece);
        assert!(!done.unwrap());
        assert_eq!(bodies, [b"one".to_vec(), b"two".to_vec()]);
        assert!(read(&message(DONE, 7, &[0; 4])).0.unwrap());
    }

    #[test]
    fn errors_are_the_kernels() {
        let refused = message(ERROR, 7, &(-13_i32).to_ne_bytes());
        assert!(matches!(read(&refused).0, Err(DumpError::System(Errno::ACCESS))));
        assert!(matches!(
            read(&message(ERROR, 7, b"")).0,
            Err(DumpError::Malformed(_))
        ));
    }

    #[test]
    fn wrong_lengths_are_refused() {
        for length in [0_u32, 15, 17, 1 << 30, u32::MAX] {
            let mut bytes = message(20, 7, b"");
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            assert!(matches!(read(&bytes).0, Err(DumpError::Malformed(_))), "{length}");
        }
        assert!(matches!(read(&[1, 2, 3]).0, Err(DumpError::Malformed(_))));
    }

    #[test]
    fn attributes_stop_at_nonsense() {
        let bytes = [attribute(1, b"abc"), attribute(0x8002, b""), vec![200, 0, 1, 0]].concat();
        assert_eq!(
            attributes(&bytes).collect::<Vec<_>>(),
            [(1, b"abc".as_slice()), (2, b"".as_slice())]
        );
        assert_eq!(attributes(&[0, 0, 0, 0, 0, 0, 0, 0]).count(), 0);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _ = read(&bytes);
            proptest::prop_assert!(attributes(&bytes).count() <= bytes.len() / 4 + 1);
        }
    }
}
