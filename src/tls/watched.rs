//! A connection's bytes and a request's body, watched for what their peer owes.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::tls::connections::{Connection, Stage};

/// A stream that notes when a new request begins, and that closes without cutting off its own last answer.
pub(crate) struct WatchedStream<S> {
    stream: S,
    connection: Arc<Connection>,
    /// Over HTTP/2 no: bytes between two requests are mostly pings and windows, and what is left of the idle time bounds
    /// a head that comes slowly.
    bytes_begin_a_request: bool,
    /// What was thrown away while closing, in bytes; `None` before that.
    closing: Option<usize>,
}

/// What a peer may still have under way when it is answered early: more than any body that we accept.
const LINGER_BYTES: usize = 64 << 20;

impl<S> WatchedStream<S> {
    pub(crate) fn new(stream: S, connection: Arc<Connection>) -> Self {
        Self {
            stream,
            connection,
            bytes_begin_a_request: true,
            closing: None,
        }
    }

    /// One that carries HTTP/2.
    pub(crate) fn of_streams(stream: S, connection: Arc<Connection>) -> Self {
        Self {
            bytes_begin_a_request: false,
            ..Self::new(stream, connection)
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WatchedStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let more = self.bytes_begin_a_request && buf.filled().len() > before;
        if more && self.connection.stage() == Stage::Idle {
            self.connection.enter(Stage::Head);
        }
        read
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WatchedStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Says goodbye, then reads until the peer does too.
    ///
    /// A socket closed while bytes are unread is reset, and a reset takes back the answer that is on its way: a peer that
    /// is told `413` while it still sends would see a broken connection instead. The listener bounds how long this lasts.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.closing.is_none() {
            this.connection.enter(Stage::Closing);
            this.closing = Some(0);
        }
        ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
        let mut scratch = [0; 8 << 10];
        while this.closing < Some(LINGER_BYTES) {
            let mut buf = ReadBuf::new(&mut scratch);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buf))?;
            match buf.filled().len() {
                0 => break,
                read => this.closing = this.closing.map(|sum| sum + read),
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// A request's body that notes when it is there.
pub(crate) struct WatchedBody {
    body: Incoming,
    connection: Arc<Connection>,
}

impl WatchedBody {
    pub(crate) fn new(body: Incoming, connection: Arc<Connection>) -> Self {
        Self { body, connection }
    }
}

impl Body for WatchedBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(None) = frame {
            self.connection.received();
        } else if self.body.is_end_stream() {
            self.connection.received();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
