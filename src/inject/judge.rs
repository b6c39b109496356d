//! Every gate in order, and what a pod gets that passes them all.

use super::{
    Call, Denial, Injector, Verdict,
    annotations::{self, Wishes},
    gates::{self, Candidate},
    ours::{self, Ours},
    pod::PodView,
    reason::Warning,
    resources::{self, Shares},
    settings::NativeSetting,
};

/// A pod that was not stopped.
pub(super) enum Judgement<'p, 'a> {
    /// Nothing of ours is there yet.
    First(Box<Accepted<'p>>),
    /// An earlier call injected it.
    Again(Again<'p, 'a>),
}

/// What a pod gets.
pub(super) struct Accepted<'p> {
    pub(super) wishes: Wishes<'p>,
    pub(super) shares: Shares,
    pub(super) native: bool,
    /// Volumes of ours that the pod has already.
    pub(super) volumes: Vec<&'static str>,
}

/// What is there of an earlier call.
pub(super) struct Again<'p, 'a> {
    pub(super) ours: Ours<'p, 'a>,
    pub(super) volumes: Vec<&'static str>,
}

impl Injector {
    /// Asks every gate.
    ///
    /// # Errors
    /// The verdict of the first that stops the pod.
    pub(super) fn judge<'p, 'a>(
        &'p self,
        pod: &'p PodView<'a>,
        call: &Call<'_>,
        warnings: &mut Vec<Warning>,
    ) -> Result<Judgement<'p, 'a>, Verdict> {
        let candidate = Candidate { pod, call };
        gates::pass(&gates::FIRST, &candidate)?;
        let volumes = match self.presence(pod)? {
            (Some(ours), volumes) => return Ok(Judgement::Again(Again { ours, volumes })),
            (None, volumes) => volumes,
        };
        let accepted = self.accept(pod, call, volumes, warnings)?;
        gates::pass(&gates::LAST, &candidate)?;
        Ok(Judgement::First(Box::new(accepted)))
    }

    /// Rows 18 and 19: what of ours is there already.
    pub(super) fn presence<'p, 'a>(
        &self,
        pod: &'p PodView<'a>,
    ) -> Result<(Option<Ours<'p, 'a>>, Vec<&'static str>), Denial> {
        let ours = ours::presence(pod)?;
        let volumes = ours::volumes_present(pod, &self.fragments.volumes, ours.is_some())?;
        Ok((ours, volumes))
    }

    /// Row 20: what the annotations ask for can be done.
    pub(super) fn accept<'p>(
        &'p self,
        pod: &'p PodView<'_>,
        call: &Call<'_>,
        volumes: Vec<&'static str>,
        warnings: &mut Vec<Warning>,
    ) -> Result<Accepted<'p>, Denial> {
        let annotations = pod.annotations();
        let wishes = annotations::read(annotations, &pod.init_names(), &self.settings, warnings)?;
        let shares = resources::shares(pod, &wishes, &self.settings)?;
        let native = is_native(pod, wishes.native, call.oldest_kubelet);
        Ok(Accepted {
            wishes,
            shares,
            native,
            volumes,
        })
    }
}

/// The oldest minor version whose kubelets start native sidecars by default (KEP-753: beta), so that pods that end can.
const NATIVE_FOR_JOBS: u32 = 29;
/// The one in which they are stable.
const NATIVE_FOR_ALL: u32 = 33;

fn is_native(pod: &PodView<'_>, setting: NativeSetting, oldest_kubelet: Option<u32>) -> bool {
    let needed = if pod.ends() {
        NATIVE_FOR_JOBS
    } else {
        NATIVE_FOR_ALL
    };
    match setting {
        NativeSetting::True => true,
        NativeSetting::False => false,
        NativeSetting::Auto => oldest_kubelet.is_none_or(|minor| minor >= needed),
    }
}
