//! Listening, accepting, loading, draining.
//!
//! The server answers from the first moment: while the model is being loaded, with 503. After SIGTERM or SIGINT it
//! accepts no connection any more, finishes what runs, and ends; a second signal ends it at once.

use crate::app::{App, Phase};
use crate::engine::EngineThread;
use crate::options::{Notice, ServeError, Served, ServerOptions};
use crate::patience::Patient;
use crate::routes;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};

/// The most bytes of a request's head; hyper allows no less than 8 KiB.
const MAX_HEAD: usize = 64 << 10;
/// The most lines of a request's head.
const MAX_HEADERS: usize = 64;
/// Threads that read and write connections; computing has threads of its own.
const WORKERS: usize = 2;
/// Threads that render templates, encode texts and compile grammars.
const PREPARING: usize = 4;

/// A server that listens and has not begun to answer.
pub struct Server {
    listener: std::net::TcpListener,
    address: SocketAddr,
    options: ServerOptions,
    stop: watch::Sender<bool>,
}

/// Ends a server from another thread, as a signal does.
#[derive(Clone)]
pub struct Stop(watch::Sender<bool>);

impl Stop {
    /// Lets running answers finish, then the server ends.
    pub fn drain(&self) {
        self.0.send_replace(true);
    }
}

impl Server {
    /// Listens.
    ///
    /// # Errors
    /// [`ServeError::Listen`].
    pub fn bind(options: ServerOptions) -> Result<Self, ServeError> {
        let refuse = |source| ServeError::Listen {
            host: options.host.clone(),
            port: options.port,
            source,
        };
        let host = options.host.trim_matches(['[', ']']);
        let listener = std::net::TcpListener::bind((host, options.port)).map_err(refuse)?;
        listener.set_nonblocking(true).map_err(refuse)?;
        let address = listener.local_addr().map_err(refuse)?;
        Ok(Server {
            listener,
            address,
            options,
            stop: watch::Sender::new(false),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What ends it.
    pub fn stop(&self) -> Stop {
        Stop(self.stop.clone())
    }

    /// Loads the model and answers requests until a signal comes.
    ///
    /// # Errors
    /// Those of `load`, as [`ServeError::Load`]; what else keeps the server from going on.
    pub fn run<E>(
        self,
        load: impl FnOnce() -> Result<Served, E> + Send + 'static,
        notice: impl Fn(Notice) + Send + 'static,
    ) -> Result<(), ServeError>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .max_blocking_threads(PREPARING)
            .thread_name("windlass-http")
            .enable_all()
            .build()?;
        let app = Arc::new(App::new(self.options.clone()));
        notice(Notice::Listening(self.address));
        let (failed, failure) = tokio::sync::oneshot::channel();
        let loading = {
            let app = app.clone();
            std::thread::Builder::new()
                .name("windlass-engine".into())
                .spawn(move || {
                    let outcome = load()
                        .map_err(|error| ServeError::Load(error.into()))
                        .and_then(|served| EngineThread::new(&app, served));
                    let outcome = outcome.and_then(EngineThread::run);
                    // The receiver is gone when the server has ended first.
                    let _ = failed.send(outcome);
                })?
        };
        let outcome = runtime.block_on(self.serve(app.clone(), failure, notice));
        // What is left of connections ends here; the engine then sees that nobody can ask it any more.
        runtime.shutdown_timeout(Duration::from_secs(1));
        if app.end() {
            // It ends with its step.
            let _ = loading.join();
        }
        outcome
    }

    async fn serve(
        self,
        app: Arc<App>,
        mut engine: tokio::sync::oneshot::Receiver<Result<(), ServeError>>,
        notice: impl Fn(Notice),
    ) -> Result<(), ServeError> {
        let listener = TcpListener::from_std(self.listener)?;
        let router = routes::router(&app);
        let places = Arc::new(Semaphore::new(self.options.max_connections));
        let mut stop = self.stop.subscribe();
        let mut phase = app.watch_phase();
        // A small model may be ready before anybody looks.
        phase.mark_changed();
        let mut signals = Signals::listen()?;
        loop {
            let place = places.clone().acquire_owned();
            let accept = async {
                let place = place.await.expect("the semaphore is never closed");
                (listener.accept().await, place)
            };
            tokio::select! {
                (connection, place) = accept => match connection {
                    Ok((stream, _)) => {
                        let connection = serve_connection(app.clone(), router.clone(), stream, self.stop.subscribe());
                        tokio::spawn(async move {
                            connection.await;
                            drop(place);
                        });
                    }
                    // Mostly too many open files: wait until some are closed.
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                Ok(()) = phase.changed() => if *phase.borrow_and_update() == Phase::Ready {
                    notice(Notice::Ready(self.address));
                },
                outcome = &mut engine => return outcome.unwrap_or_else(|_| Err(ServeError::Engine {
                    reason: "its thread has panicked".into(),
                })),
                () = told(&mut stop) => break,
                () = signals.next() => break,
            }
        }
        drop(listener);
        app.set_phase(Phase::Draining);
        self.stop.send_replace(true);
        notice(Notice::Draining);
        let all = self.options.max_connections as u32;
        tokio::select! {
            _ = places.acquire_many(all) => {}
            () = tokio::time::sleep(self.options.drain_timeout) => tracing::warn!("answers are cut off: the time to finish them is over"),
            () = signals.next() => tracing::warn!("answers are cut off by a second signal"),
        }
        Ok(())
    }
}

/// The signals that end a program politely.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Waits until the server is to end.
async fn told(stop: &mut watch::Receiver<bool>) {
    // The sender lives as long as the server.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Answers the requests of one connection. When the server drains, the connection ends with the answer under way.
async fn serve_connection(
    app: Arc<App>,
    router: Router,
    stream: TcpStream,
    mut stop: watch::Receiver<bool>,
) {
    // Tokens are small and wanted at once.
    let _ = stream.set_nodelay(true);
    let stream = TokioIo::new(Patient::new(stream, app.options.write_timeout));
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(app.options.header_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD);
    let connection = builder.serve_connection(stream, TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = told(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}
