//! Bytes between processes: several transfers at once over non-blocking sockets, asleep in `poll` between them.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use crate::steps::Steps;

const CHUNK: usize = 256 << 10;

/// Bytes still to be sent to or received from one peer.
pub(crate) struct Transfer<'a> {
    pub(crate) stream: &'a TcpStream,
    pub(crate) sends: bool,
    pub(crate) left: u64,
    pub(crate) steps: &'a mut Steps,
}

/// Carries all transfers to their end.
///
/// # Errors
/// When a peer is gone, or `aborted` says so.
pub(crate) fn carry(transfers: &mut [Transfer<'_>], aborted: &dyn Fn() -> bool) -> io::Result<()> {
    let mut scratch = vec![0x5a; CHUNK];
    for transfer in transfers.iter_mut().filter(|transfer| transfer.left > 0) {
        transfer.steps.ready();
    }
    while transfers.iter().any(|transfer| transfer.left > 0) {
        let mut stuck = true;
        for transfer in transfers.iter_mut().filter(|transfer| transfer.left > 0) {
            stuck &= !step(transfer, &mut scratch)?;
        }
        if stuck {
            if aborted() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            let pending = transfers.iter().filter(|transfer| transfer.left > 0);
            wait(pending.map(|transfer| (transfer.stream, transfer.sends)))?;
        }
    }
    Ok(())
}

/// Moves one chunk; false when the socket would block.
fn step(transfer: &mut Transfer<'_>, scratch: &mut [u8]) -> io::Result<bool> {
    let part = usize::try_from(transfer.left).unwrap_or(CHUNK).min(CHUNK);
    let mut stream = transfer.stream;
    let moved = if transfer.sends {
        stream.write(&scratch[..part])
    } else {
        stream.read(&mut scratch[..part])
    };
    match moved {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => {
            transfer.left -= count as u64;
            if !transfer.sends {
                crate::drain::pause_after(count);
            }
            transfer.steps.moved(count as u64, transfer.left);
            Ok(true)
        }
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Sleeps until one of these can send or has something to read.
fn wait<'a>(pending: impl Iterator<Item = (&'a TcpStream, bool)>) -> io::Result<()> {
    let mut polls: Vec<libc::pollfd> = pending
        .map(|(stream, sends)| libc::pollfd {
            fd: stream.as_raw_fd(),
            events: if sends { libc::POLLOUT } else { libc::POLLIN },
            revents: 0,
        })
        .collect();
    // SAFETY: a live array of `polls.len()` entries.
    let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, 500) };
    if ready < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sends a small message.
pub(crate) fn send_word(stream: &TcpStream, word: u64, aborted: &dyn Fn() -> bool) -> io::Result<()> {
    exact(stream, &mut word.to_le_bytes(), true, aborted)
}

/// Receives a small message.
pub(crate) fn receive_word(stream: &TcpStream, aborted: &dyn Fn() -> bool) -> io::Result<u64> {
    let mut bytes = [0; 8];
    exact(stream, &mut bytes, false, aborted)?;
    Ok(u64::from_le_bytes(bytes))
}

fn exact(
    mut stream: &TcpStream,
    bytes: &mut [u8],
    sends: bool,
    aborted: &dyn Fn() -> bool,
) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let moved = if sends {
            stream.write(&bytes[done..])
        } else {
            stream.read(&mut bytes[done..])
        };
        match moved {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                if aborted() {
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
                wait(std::iter::once((stream, sends)))?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn both_directions_flow_at_once_without_deadlock() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
        let near = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        let far = listener.accept().expect("accept").0;
        let bytes = 24 << 20;
        let both = move |stream: TcpStream| {
            stream.set_nonblocking(true).expect("non-blocking");
            let [mut sending, mut receiving] = [true, false].map(|sends| Steps::new(&stream, 0, sends));
            let transfer = |steps, sends| Transfer {
                stream: &stream,
                sends,
                left: bytes,
                steps,
            };
            let both = &mut [transfer(&mut sending, true), transfer(&mut receiving, false)];
            carry(both, &|| false).expect("carried");
            send_word(&stream, 7, &|| false).expect("sent");
            receive_word(&stream, &|| false).expect("received")
        };
        let thread = std::thread::spawn(move || both(far));
        assert_eq!(both(near), 7);
        assert_eq!(thread.join().expect("thread"), 7);
    }
}
