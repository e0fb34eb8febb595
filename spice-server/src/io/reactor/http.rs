//! Browsers: the page they are shown, and WebSockets.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Page, Reactor, Stage};
use crate::{
    Refusal, ServerEvent,
    io::{links::PendingLink, shared::lock},
    proto::{
        channel::ChannelType,
        http::{self, MAX_HEAD, Request, Status},
    },
};

/// How long a browser may take to read a file.
const PAGE_TIMEOUT: Duration = Duration::from_secs(30);

impl Reactor {
    /// Looks at what a browser has sent so far.
    pub(super) fn run_http(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let Stage::Http { head, .. } = &connection.stage else { return };
        // More than a head and the first frames after it: nobody sends that before an answer.
        let parsed =
            if head.len() > 2 * MAX_HEAD { Err(Status::TooLarge) } else { http::parse(head) };
        match parsed {
            Ok(None) => {}
            Ok(Some(request)) => self.answer_http(token, request),
            Err(status) => self.answer(token, &http::failure(status, "not understood"), None),
        }
    }

    fn answer_http(&mut self, token: u64, mut request: Request) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let config = &self.shared.config;
        let has_tls = lock(&self.shared.tls).is_some();
        let encrypted = connection.stream.is_secure();
        if let Some(upgrade) = request.upgrade.take() {
            let peer = connection.peer;
            if !request.is_welcome(&config.origins) {
                let origin = request.origin.as_deref().unwrap_or_default();
                if self.guard.may_log() {
                    tracing::warn!(%peer, origin, "a page of another site wanted to connect");
                }
                self.shared.emit(ServerEvent::Refused { peer, reason: Refusal::ForeignPage });
                let text = "pages of other sites may not connect";
                return self.answer(token, &http::failure(Status::Forbidden, text), None);
            }
            let stage = std::mem::replace(
                &mut connection.stage,
                Stage::Closing { until: Instant::now(), page: None },
            );
            let Stage::Http { mut head, until } = stage else { return };
            head.drain(..request.length.min(head.len()));
            connection.stage = Stage::Link(Box::new(PendingLink::new(until)));
            if let Err(error) = connection.stream.upgrade(upgrade.as_bytes(), head) {
                return self.hang_up(token, &error);
            }
            // Frames that came with the request are not in the socket any more.
            self.read_again.push(token);
            return;
        }
        let must_be_secure = connection.tls_only || config.secure.contains(ChannelType::Main);
        let Some(page) = &config.web else {
            let text = "This is a SPICE server, and it has no page for browsers (--web).";
            return self.answer(token, &http::failure(Status::NotFound, text), None);
        };
        let head = match &request.host {
            Some(host) if must_be_secure && !encrypted && has_tls => {
                http::redirect(&format!("https://{host}{}{}", request.path, request.query))
            }
            _ if request.path == "/" => {
                http::redirect(&format!("{}{}", page.start(), request.query))
            }
            _ => match page.file(&request.path) {
                Some((kind, content)) => {
                    let head = http::page(kind, content.len());
                    return self.answer(token, &head, Some(content));
                }
                None => http::failure(Status::NotFound, "There is no such file."),
            },
        };
        self.answer(token, &head, None);
    }

    /// Sends an answer, then a page, and closes.
    fn answer(&mut self, token: u64, head: &str, content: Option<Arc<[u8]>>) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        connection.out.extend_from_slice(head.as_bytes());
        let page = content.map(|content| Page { content, sent: 0 });
        connection.stage = Stage::Closing { until: Instant::now() + PAGE_TIMEOUT, page };
        self.flush(token);
    }
}
