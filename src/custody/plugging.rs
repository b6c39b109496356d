//! The operator's issuer, as whoever leads finds it beside the journal.

use jiff::Timestamp;

use super::{Custody, metrics::Step};
use crate::{
    ca::{
        KeyId,
        journal::{HomeError, JournalHome},
        plugged::{self, PlugError, Plugged},
    },
    custody::advance::in_time,
};

/// What came of the operator's issuer. It changes only when there is something new to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plugging {
    /// There is none, or nobody here has looked yet.
    None,
    /// It signs.
    Signs(KeyId),
    /// Its root is trusted and it signs from then on.
    Waits {
        /// Its key id.
        issuer: KeyId,
        /// When it begins.
        from: Timestamp,
    },
    /// It cannot be used; what signed before it goes on.
    Refused(PlugError),
    /// It was there, and is no more; what was taken over of it goes on.
    Gone,
}

impl<H: JournalHome> Custody<H> {
    /// Reads it and checks it. What is wrong is told once, and counted at each look.
    pub(super) async fn look_at_plugged(&self) -> Option<Plugged> {
        let found = match in_time(self.home.plugged()).await {
            Ok(found) => found,
            Err(error) => {
                self.plugged_unread(&error);
                return None;
            }
        };
        let Some(files) = found else {
            self.metrics.plugged(None);
            let was_there = *self.plugging.borrow() != Plugging::None || self.signs_for_operator();
            if was_there {
                self.tell(Plugging::Gone);
            }
            return None;
        };
        let now = self.clock.now();
        let trust_domain = self.authority().trust_domain().clone();
        match plugged::read(&files, &trust_domain, &self.policy.leaf, now) {
            Ok(plugged) => Some(plugged),
            Err(fault) => {
                self.metrics.failed(Step::Plug);
                self.metrics.plugged(Some(false));
                self.tell(Plugging::Refused(fault));
                None
            }
        }
    }

    /// Whether what is plugged in signs now.
    pub(super) fn compare_with_plugged(&self, plugged: Option<&Plugged>) {
        let Some(plugged) = plugged else { return };
        let authority = self.authority();
        let issuer = plugged.issuer().id().clone();
        let signs =
            *authority.issuer_key_id() == issuer && authority.root_key_id() == plugged.root().id();
        self.metrics.plugged(Some(signs));
        if signs {
            self.tell(Plugging::Signs(issuer));
        } else if let Some(from) = self.held().next_elapsed {
            self.tell(Plugging::Waits { issuer, from });
        }
    }

    fn signs_for_operator(&self) -> bool {
        self.held().plugged
    }

    fn plugged_unread(&self, error: &HomeError) {
        self.metrics.failed(Step::Plug);
        let cause = std::error::Error::source(error).map(ToString::to_string);
        tracing::warn!(%error, cause, "cannot look for an operator's issuer; what was last taken over stays in use");
    }

    fn tell(&self, news: Plugging) {
        self.plugging.send_if_modified(|present| {
            let changed = *present != news;
            if changed {
                news.log();
                *present = news;
            }
            changed
        });
    }
}

impl Plugging {
    /// One sentence for people; none where there is nothing to tell.
    pub fn words(&self) -> Option<String> {
        Some(match self {
            Self::None => return None,
            Self::Signs(issuer) => format!("the plugged-in issuer {issuer} signs"),
            Self::Waits { issuer, from } => format!(
                "the root of the plugged-in issuer {issuer} is trusted from now on; it signs from {from} on, when everybody has learnt of it"
            ),
            Self::Refused(fault) => format!(
                "{}: the plugged-in issuer cannot be used, and what signed before goes on: {fault}",
                fault.code()
            ),
            Self::Gone => {
                "no issuer is plugged in any more; what was taken over of it goes on signing to its end".to_owned()
            }
        })
    }

    /// Whether somebody should look.
    pub fn is_warning(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::Gone)
    }

    fn log(&self) {
        match self.words() {
            Some(words) if self.is_warning() => tracing::error!("{words}"),
            Some(words) => tracing::info!("{words}"),
            None => {}
        }
    }
}
