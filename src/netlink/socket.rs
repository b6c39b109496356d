//! A netlink socket: what is sent, what the kernel answers.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom,
            sendto, setsockopt, socket, sockopt,
        },
        time::TimeVal,
    },
};

use super::wire::{self, Says};

/// The kernel answers before `sendto` returns; a longer silence is a fault.
const PATIENCE: TimeVal = TimeVal::new(5, 0);
/// The kernel dumps in pieces of at most 32 KiB.
const DATAGRAM: usize = 64 << 10;
/// Memory that the kernel takes for each answer until it is read.
const ANSWER: usize = 2 << 10;

pub(super) struct Socket {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

/// One object of a dump: its type, and what follows its header.
pub(super) type Object = (u16, Vec<u8>);

/// How a batch or a single message went.
pub(super) enum Outcome {
    /// All of it is done.
    Done,
    /// The message with this sequence number was refused, and so nothing was done.
    Refused(u32, Errno),
    /// Answers were lost: what was done must be read.
    Unknown,
}

impl Socket {
    pub(super) fn open(protocol: SockProtocol) -> Result<Self, Errno> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &PATIENCE)?;
        let buffer = vec![0; DATAGRAM];
        Ok(Self { fd, buffer })
    }

    /// Sends messages in one piece and waits for the answer to each of `asked` (ascending sequence numbers).
    pub(super) fn transact(&mut self, bytes: &[u8], asked: &[u32]) -> Result<Outcome, Errno> {
        self.make_room(bytes.len(), asked.len() * ANSWER);
        self.send(bytes)?;
        let mut answered = 0;
        while answered < asked.len() {
            let datagram = match self.receive() {
                Ok(datagram) => datagram,
                Err(Errno::ENOBUFS | Errno::EAGAIN) => return Ok(Outcome::Unknown),
                Err(error) => return Err(error),
            };
            for reply in wire::replies(datagram) {
                match reply.says {
                    Says::Ok if asked.contains(&reply.sequence) => answered += 1,
                    Says::Failed(error) => {
                        return Ok(Outcome::Refused(reply.sequence, Errno::from_raw(error)));
                    }
                    _ => {}
                }
            }
        }
        Ok(Outcome::Done)
    }

    /// Everything that the kernel tells about a question.
    pub(super) fn dump(&mut self, question: &[u8]) -> Result<Vec<Object>, Errno> {
        loop {
            self.send(question)?;
            if let Some(objects) = self.objects()? {
                return Ok(objects);
            }
        }
    }

    /// `None` if the objects changed meanwhile.
    fn objects(&mut self) -> Result<Option<Vec<Object>>, Errno> {
        let (mut objects, mut interrupted) = (Vec::new(), false);
        loop {
            for reply in wire::replies(self.receive()?) {
                match reply.says {
                    Says::Object(kind, body) => objects.push((kind, body.to_vec())),
                    Says::Interrupted => interrupted = true,
                    Says::Failed(error) => return Err(Errno::from_raw(error)),
                    Says::Done | Says::Ok => return Ok((!interrupted).then_some(objects)),
                }
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Errno> {
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.fd.as_raw_fd(), bytes, &kernel, MsgFlags::empty()).map(drop)
    }

    /// One datagram of the kernel; another process' are passed over.
    fn receive(&mut self) -> Result<&[u8], Errno> {
        let length = loop {
            let received = recvfrom::<NetlinkAddr>(self.fd.as_raw_fd(), &mut self.buffer);
            match received {
                Ok((length, Some(sender))) if sender.pid() == 0 => break length,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        };
        Ok(&self.buffer[..length.min(DATAGRAM)])
    }

    /// Room for many rules. Beyond the system's limit only `NET_ADMIN` of the machine itself helps, and not that of a
    /// user namespace; where there is no room, the answers are [`Outcome::Unknown`].
    fn make_room(&self, send: usize, receive: usize) {
        const USUAL: usize = 200 << 10;
        if send > USUAL / 2 {
            let forced = setsockopt(&self.fd, sockopt::SndBufForce, &send);
            let _ = forced.or_else(|_| setsockopt(&self.fd, sockopt::SndBuf, &send));
        }
        if receive > USUAL / 2 {
            let forced = setsockopt(&self.fd, sockopt::RcvBufForce, &receive);
            let _ = forced.or_else(|_| setsockopt(&self.fd, sockopt::RcvBuf, &receive));
        }
    }
}

/// As an I/O error, for a chain of causes.
pub(super) fn io(errno: Errno) -> io::Error {
    errno.into()
}
