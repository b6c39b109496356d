//! Events for people (`events.k8s.io/v1`): told from anywhere, written by one future, a few a second.
//!
//! [`Note`] -> bounded queue -> one POST each
//!
//! An Event's name is made from what it tells, so that a second replica, or the same one after a restart, that tells the
//! same again within the hour an Event lives gets 409 and nothing is written twice. A full queue drops: Events inform, and
//! nothing waits for them.

use std::{future::Future, time::Duration};

use aws_lc_rs::digest::{Context, SHA256};
use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use tokio::{sync::mpsc, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::ask;
use crate::clock::Clock;

/// Notes that may wait. At [`PER_SECOND`] it is emptied in under two minutes.
const QUEUE: usize = 512;

/// Events written in a second at most: a namespace of a thousand workloads that is labelled must not be a load.
const PER_SECOND: u32 = 5;

/// The API server refuses a longer note.
const NOTE_LIMIT: usize = 1024;

/// Whether something went as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// It did.
    Normal,
    /// Somebody should look.
    Warning,
}

/// One thing to tell about one object.
#[derive(Clone, Debug)]
pub struct Note {
    /// What it is about.
    pub regarding: ObjectReference,
    /// Normal or warning.
    pub kind: Kind,
    /// Such as `SidecarInjected`.
    pub reason: &'static str,
    /// What was done, as a verb.
    pub action: &'static str,
    /// One or two sentences.
    pub text: String,
    /// What makes this note another than one about the same object with the same reason.
    pub distinction: String,
}

/// Takes notes without waiting.
#[derive(Clone, Debug)]
pub struct Notes(mpsc::Sender<Note>);

impl Notes {
    /// Queues a note; whether there was room for it.
    pub fn tell(&self, note: Note) -> bool {
        self.0.try_send(note).is_ok()
    }
}

/// The queue and the future that writes what is in it, until `stop`. `instance` is this replica's pod name.
pub fn write(
    client: Client,
    clock: Clock,
    instance: String,
    stop: CancellationToken,
) -> (Notes, impl Future<Output = ()> + Send) {
    let (tell, mut told) = mpsc::channel::<Note>(QUEUE);
    (Notes(tell), async move {
        let writing = async {
            while let Some(note) = told.recv().await {
                post(&client, note, &clock, &instance).await;
                sleep(Duration::from_secs(1) / PER_SECOND).await;
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = writing => stop.cancelled().await,
        }
    })
}

async fn post(client: &Client, note: Note, clock: &Clock, instance: &str) {
    let reason = note.reason;
    let event = event(note, clock, instance);
    let namespace = event.metadata.namespace.clone().unwrap_or_default();
    let events: Api<Event> = Api::namespaced(client.clone(), &namespace);
    match ask(events.create(&PostParams::default(), &event)).await {
        Ok(_) => {}
        // told before
        Err(error) if error.code() == Some(409) => {}
        // the namespace is being deleted, a quota is full: nobody is helped by a second try
        Err(error) => debug!(reason, namespace, %error, "an Event was not written"),
    }
}

fn event(note: Note, clock: &Clock, instance: &str) -> Event {
    // Events about objects without a namespace live in `default`, where kubectl looks for them
    let namespace = note.regarding.namespace.clone();
    let namespace = namespace
        .filter(|it| !it.is_empty())
        .unwrap_or_else(|| "default".to_owned());
    Event {
        metadata: ObjectMeta {
            name: Some(name(&note)),
            namespace: Some(namespace),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(clock.now())),
        reporting_controller: Some("malha.io/control-plane".to_owned()),
        reporting_instance: Some(cut(instance, 128).to_owned()),
        action: Some(note.action.to_owned()),
        reason: Some(note.reason.to_owned()),
        note: Some(cut(&note.text, NOTE_LIMIT).to_owned()),
        type_: Some(match note.kind {
            Kind::Normal => "Normal".to_owned(),
            Kind::Warning => "Warning".to_owned(),
        }),
        regarding: Some(note.regarding),
        ..Event::default()
    }
}

/// `<object>.<hash of what is told>`: a DNS subdomain, since the object's own name is one and is cut to leave room.
fn name(note: &Note) -> String {
    let mut told = Context::new(&SHA256);
    let regarding = &note.regarding;
    for part in [
        regarding.uid.as_deref().unwrap_or_default(),
        regarding.kind.as_deref().unwrap_or_default(),
        regarding.name.as_deref().unwrap_or_default(),
        note.reason,
        &note.distinction,
    ] {
        told.update(part.as_bytes());
        told.update(&[0]);
    }
    let digest = told.finish();
    let hash = digest
        .as_ref()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect::<String>();
    let object = regarding.name.as_deref().unwrap_or("malha");
    let object = cut(object, 230).trim_end_matches(['.', '-']);
    format!("{object}.{hash}")
}

/// At most `limit` bytes of a text, whole characters.
fn cut(text: &str, limit: usize) -> &str {
    let mut end = limit.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &str, distinction: &str) -> Note {
        Note {
            regarding: ObjectReference {
                kind: Some("ReplicaSet".to_owned()),
                name: Some(name.to_owned()),
                namespace: Some("shop".to_owned()),
                uid: Some("u".to_owned()),
                ..ObjectReference::default()
            },
            kind: Kind::Normal,
            reason: "SidecarInjected",
            action: "Inject",
            text: "é".repeat(2000),
            distinction: distinction.to_owned(),
        }
    }

    #[test]
    fn the_same_note_has_the_same_name_in_every_process() {
        // a literal: another process must compute the same
        assert_eq!(name(&note("web", "a")), "web.06d65e108c997ac3");
        assert_ne!(name(&note("web", "a")), name(&note("web", "b")));
    }

    #[test]
    fn names_and_notes_keep_within_their_limits() {
        let long = note(&format!("{}-x", "a".repeat(229)), "a");
        let event = event(long, &Clock::new(|| jiff::Timestamp::UNIX_EPOCH), "malha-0");
        let name = event.metadata.name.expect("named");
        assert!(name.len() <= 253 && !name.contains("-."), "{name}");
        assert_eq!(event.note.expect("a note").len(), 1024);
    }
}
