//! How ranks find each other: the unique id names a listener in the process that made it; every rank tells it about
//! itself and gets everyone's answer back.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Size of what a rank says about itself.
pub(crate) const CARD_BYTES: usize = 48;
/// How long to wait for the others.
const PATIENCE: Duration = Duration::from_secs(120);
const MAX_RANKS: u32 = 4_096;

/// NCCL's unique id: 128 opaque bytes; here a random key and the root's address, as in NCCL.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct UniqueId(pub(crate) [u8; 128]);

impl UniqueId {
    fn new(key: u64, root: SocketAddrV4) -> Self {
        let mut bytes = [0; 128];
        bytes[..8].copy_from_slice(&key.to_le_bytes());
        bytes[8..10].copy_from_slice(&2_u16.to_le_bytes());
        bytes[10..12].copy_from_slice(&root.port().to_be_bytes());
        bytes[12..16].copy_from_slice(&root.ip().octets());
        Self(bytes)
    }

    /// Key of the communicator.
    pub(crate) fn key(&self) -> u64 {
        u64::from_le_bytes(self.0[..8].try_into().unwrap_or_default())
    }

    /// Where the root listens.
    pub(crate) fn root(&self) -> SocketAddrV4 {
        let port = u16::from_be_bytes([self.0[10], self.0[11]]);
        SocketAddrV4::new(
            Ipv4Addr::new(self.0[12], self.0[13], self.0[14], self.0[15]),
            port,
        )
    }
}

/// A key that no other communicator has.
pub(crate) fn random_key() -> u64 {
    std::collections::hash_map::RandomState::new()
        .build_hasher()
        .finish()
        | 1
}

/// First IPv4 address of an interface other than loopback; loopback when there is none.
pub(crate) fn own_address() -> Ipv4Addr {
    let mut list = std::ptr::null_mut();
    // SAFETY: getifaddrs fills `list`, freed below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Ipv4Addr::LOCALHOST;
    }
    let (mut at, mut found) = (list, None);
    while !at.is_null() && found.is_none() {
        // SAFETY: `at` is a live entry of the list.
        let entry = unsafe { &*at };
        if !entry.ifa_addr.is_null() && entry.ifa_flags & libc::IFF_LOOPBACK.cast_unsigned() == 0 {
            // SAFETY: the address is at least a family; it is an IPv4 address when the family says so.
            let family = unsafe { (*entry.ifa_addr).sa_family };
            if i32::from(family) == libc::AF_INET {
                // SAFETY: as above.
                let address = unsafe { *entry.ifa_addr.cast::<libc::sockaddr_in>() };
                found = Some(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr)));
            }
        }
        at = entry.ifa_next;
    }
    // SAFETY: the list came from getifaddrs and is not used again.
    unsafe { libc::freeifaddrs(list) };
    found.unwrap_or(Ipv4Addr::LOCALHOST)
}

/// Starts a root in this process and names it.
///
/// # Errors
/// When no socket or thread can be had.
pub(crate) fn start_root() -> io::Result<UniqueId> {
    let listener = TcpListener::bind((own_address(), 0))?;
    let SocketAddr::V4(address) = listener.local_addr()? else {
        return Err(io::Error::other("not an IPv4 address"));
    };
    std::thread::Builder::new()
        .name("nccl-root".into())
        .spawn(move || serve(&listener))?;
    Ok(UniqueId::new(random_key(), address))
}

struct Waiting {
    stream: TcpStream,
    rank: u32,
    card: [u8; CARD_BYTES],
}

fn serve(listener: &TcpListener) {
    let mut meetings: HashMap<u64, Vec<Waiting>> = HashMap::new();
    for stream in listener.incoming().flatten() {
        let Ok((key, ranks, waiting)) = greet(stream) else {
            continue;
        };
        let meeting = meetings.entry(key).or_default();
        meeting.push(waiting);
        if meeting.len() >= ranks as usize {
            let mut all = meetings.remove(&key).unwrap_or_default();
            all.sort_by_key(|waiting| waiting.rank);
            let cards: Vec<u8> = all.iter().flat_map(|waiting| waiting.card).collect();
            for mut waiting in all {
                // A rank that left meanwhile is found out by its peers.
                let _gone = waiting.stream.write_all(&cards);
            }
        }
    }
}

fn greet(mut stream: TcpStream) -> io::Result<(u64, u32, Waiting)> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut head = [0; 16];
    stream.read_exact(&mut head)?;
    let mut card = [0; CARD_BYTES];
    stream.read_exact(&mut card)?;
    let key = u64::from_le_bytes(head[..8].try_into().unwrap_or_default());
    let rank = u32::from_le_bytes(head[8..12].try_into().unwrap_or_default());
    let ranks = u32::from_le_bytes(head[12..].try_into().unwrap_or_default());
    if ranks == 0 || ranks > MAX_RANKS || rank >= ranks {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "rank outside the communicator",
        ));
    }
    Ok((key, ranks, Waiting { stream, rank, card }))
}

/// Gives `card` to the root and returns everyone's, by rank.
///
/// # Errors
/// When the root cannot be reached or not all ranks come in time.
pub(crate) fn meet(
    root: SocketAddrV4,
    key: u64,
    rank: u32,
    ranks: u32,
    card: &[u8; CARD_BYTES],
) -> io::Result<Vec<[u8; CARD_BYTES]>> {
    let mut stream = connect(root)?;
    let mut hello = Vec::with_capacity(16 + CARD_BYTES);
    hello.extend(key.to_le_bytes());
    hello.extend(rank.to_le_bytes());
    hello.extend(ranks.to_le_bytes());
    hello.extend(card);
    stream.write_all(&hello)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut all = vec![[0; CARD_BYTES]; ranks as usize];
    for card in &mut all {
        stream.read_exact(card)?;
    }
    Ok(all)
}

/// Connects, trying again while the other side is not up yet.
pub(crate) fn connect(address: SocketAddrV4) -> io::Result<TcpStream> {
    let begun = Instant::now();
    loop {
        match TcpStream::connect_timeout(&address.into(), Duration::from_secs(2)) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) if begun.elapsed() > PATIENCE => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_meet_and_see_each_other_in_order() {
        let id = start_root().expect("root");
        let rank = |rank: u32| {
            std::thread::spawn(move || {
                let mut card = [0; CARD_BYTES];
                card[0] = 10 + u8::try_from(rank).unwrap_or(0);
                meet(id.root(), id.key(), rank, 3, &card)
                    .map(|all| all.iter().map(|card| card[0]).collect::<Vec<_>>())
            })
        };
        let threads: Vec<_> = [2, 0, 1].map(rank).into_iter().collect();
        for thread in threads {
            assert_eq!(thread.join().expect("thread").expect("meeting"), [10, 11, 12]);
        }
    }
}
