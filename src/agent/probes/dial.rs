//! A connection to the pod's own address that redirection leaves alone.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use tokio::net::{TcpSocket, TcpStream};

use super::ProbeError;

/// Dials the application as the kubelet would, at the pod's own address.
///
/// What the proxy's group sends to the pod's own address over loopback is redirected to Envoy's inbound listener, so that
/// a pod may call its own Service; only what comes from 127.0.0.6 or `::6`, which are Envoy's own calls to the
/// application, goes straight on. So does this.
pub(in crate::agent) async fn dial(pod: IpAddr, port: u16) -> Result<TcpStream, ProbeError> {
    let at = SocketAddr::new(pod, port);
    let connect = async {
        let socket = socket(pod)?;
        let stream = socket.connect(at).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    };
    connect
        .await
        .map_err(|source| ProbeError::Unreachable { at, source })
}

fn socket(pod: IpAddr) -> io::Result<TcpSocket> {
    match pod {
        IpAddr::V4(_) => {
            let socket = TcpSocket::new_v4()?;
            let from = Ipv4Addr::new(127, 0, 0, 6);
            socket.bind(SocketAddr::new(from.into(), 0))?;
            Ok(socket)
        }
        IpAddr::V6(_) => {
            let socket = TcpSocket::new_v6()?;
            let from = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);
            match socket.bind(SocketAddr::new(from.into(), 0)) {
                // Whoever redirects IPv6 also gives loopback this address; without redirection it is not needed.
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
                bound => bound?,
            }
            Ok(socket)
        }
    }
}
