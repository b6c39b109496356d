//! The closed list of reason codes: the same word in log, metric, audit annotation, Event and `malha explain`.

use std::fmt;

macro_rules! codes {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }
        impl $name {
            /// Every code.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];
            /// The word.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)* }
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

codes! {
    /// The code of a decision; exactly one is counted per request.
    Reason {
        /// Patched.
        Injected,
        /// An earlier call's work was completed.
        Reinvoked,
        /// Ours are there and complete.
        AlreadyInjected,
        /// A namespace that the mesh never touches.
        ProtectedNamespace,
        /// The pod uses the node's network.
        HostNetwork,
        /// A static pod's mirror.
        MirrorPod,
        /// The namespace's label says no.
        NamespaceDisabled,
        /// The pod's label says no.
        OptedOutByLabel,
        /// The pod's annotation says no.
        OptedOutByAnnotation,
        /// Another revision's.
        OtherRevision,
        /// No label asks for a sidecar.
        NotSelected,
        /// A Windows pod.
        WindowsPod,
        /// Another mesh's sidecar is there.
        ForeignSidecar,
        /// Not readable as a pod; the API server's validation refuses it in better words.
        InvalidPod,
        /// Not the creation of a pod.
        NotAPodCreate,
        /// `sidecar.istio.io/inject` holds neither `true` nor `false`.
        InvalidInjectValue,
        /// An annotation that we read holds a bad value.
        InvalidAnnotation,
        /// An annotation that cannot be honoured without changing traffic.
        UnsupportedAnnotation,
        /// A name of ours is taken.
        NameConflict,
        /// The app runs with the proxy's gid and would bypass mTLS.
        AppUsesProxyGid,
        /// A container port is one of ours.
        PortConflict,
        /// The request is not an AdmissionReview v1.
        BadRequest,
        /// Too much in flight.
        Overloaded,
        /// Our own fault.
        Internal,
    }
}

codes! {
    /// Why a pod goes in as it is.
    SkipReason {
        /// See [`Reason::AlreadyInjected`].
        AlreadyInjected,
        /// See [`Reason::ProtectedNamespace`].
        ProtectedNamespace,
        /// See [`Reason::HostNetwork`].
        HostNetwork,
        /// See [`Reason::MirrorPod`].
        MirrorPod,
        /// See [`Reason::NamespaceDisabled`].
        NamespaceDisabled,
        /// See [`Reason::OptedOutByLabel`].
        OptedOutByLabel,
        /// See [`Reason::OptedOutByAnnotation`].
        OptedOutByAnnotation,
        /// See [`Reason::OtherRevision`].
        OtherRevision,
        /// See [`Reason::NotSelected`].
        NotSelected,
        /// See [`Reason::WindowsPod`].
        WindowsPod,
        /// See [`Reason::ForeignSidecar`].
        ForeignSidecar,
        /// See [`Reason::InvalidPod`].
        InvalidPod,
        /// See [`Reason::NotAPodCreate`].
        NotAPodCreate,
    }
}

codes! {
    /// Why a pod is refused.
    DenyReason {
        /// See [`Reason::InvalidInjectValue`].
        InvalidInjectValue,
        /// See [`Reason::InvalidAnnotation`].
        InvalidAnnotation,
        /// See [`Reason::UnsupportedAnnotation`].
        UnsupportedAnnotation,
        /// See [`Reason::NameConflict`].
        NameConflict,
        /// See [`Reason::AppUsesProxyGid`].
        AppUsesProxyGid,
        /// See [`Reason::PortConflict`].
        PortConflict,
    }
}

codes! {
    /// What an author should know although the pod is accepted.
    WarningCode {
        /// A named probe port is not among the container's ports.
        ProbePortUnresolved,
        /// A probe dials another host.
        ProbeHostExternal,
        /// Probes stay raw because an annotation says so.
        ProbesNotRewritten,
        /// Pod Security will refuse `malha-init`.
        PodSecurityForbidsInit,
        /// A Job in classic order never completes.
        ClassicJob,
        /// Init containers run before the redirection is there.
        ClassicInitNetwork,
        /// A known annotation without effect here.
        AnnotationIgnored,
        /// No such annotation.
        AnnotationUnknown,
        /// The sidecar is of another version.
        OtherVersion,
        /// Pod plus patch over 1 MiB.
        LargePod,
    }
}

impl From<SkipReason> for Reason {
    fn from(reason: SkipReason) -> Self {
        match reason {
            SkipReason::AlreadyInjected => Self::AlreadyInjected,
            SkipReason::ProtectedNamespace => Self::ProtectedNamespace,
            SkipReason::HostNetwork => Self::HostNetwork,
            SkipReason::MirrorPod => Self::MirrorPod,
            SkipReason::NamespaceDisabled => Self::NamespaceDisabled,
            SkipReason::OptedOutByLabel => Self::OptedOutByLabel,
            SkipReason::OptedOutByAnnotation => Self::OptedOutByAnnotation,
            SkipReason::OtherRevision => Self::OtherRevision,
            SkipReason::NotSelected => Self::NotSelected,
            SkipReason::WindowsPod => Self::WindowsPod,
            SkipReason::ForeignSidecar => Self::ForeignSidecar,
            SkipReason::InvalidPod => Self::InvalidPod,
            SkipReason::NotAPodCreate => Self::NotAPodCreate,
        }
    }
}

impl From<DenyReason> for Reason {
    fn from(reason: DenyReason) -> Self {
        match reason {
            DenyReason::InvalidInjectValue => Self::InvalidInjectValue,
            DenyReason::InvalidAnnotation => Self::InvalidAnnotation,
            DenyReason::UnsupportedAnnotation => Self::UnsupportedAnnotation,
            DenyReason::NameConflict => Self::NameConflict,
            DenyReason::AppUsesProxyGid => Self::AppUsesProxyGid,
            DenyReason::PortConflict => Self::PortConflict,
        }
    }
}

/// One warning: a code and one sentence of at most 120 characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The code.
    pub code: WarningCode,
    /// The sentence.
    pub text: String,
}

impl Warning {
    /// Longer ones may be cut by the API server, and people stop reading.
    pub const LONGEST: usize = 120;

    pub(super) fn new(code: WarningCode, text: fmt::Arguments<'_>) -> Self {
        Self {
            code,
            text: Self::line(code.as_str(), text),
        }
    }

    /// The code and the sentence, cut where it is too long.
    pub(super) fn line(code: &str, text: fmt::Arguments<'_>) -> String {
        let whole = format!("{code}: {text}");
        match whole.char_indices().nth(Self::LONGEST) {
            None => whole,
            Some(_) => whole
                .chars()
                .take(Self::LONGEST - 3)
                .chain("...".chars())
                .collect(),
        }
    }
}

impl Reason {
    /// What to do to have such a pod injected, in one line; nothing where it is.
    pub fn fix(self) -> Option<&'static str> {
        Some(match self {
            Self::Injected | Self::Reinvoked | Self::AlreadyInjected => return None,
            Self::ProtectedNamespace => {
                "use another namespace: the mesh never touches the cluster's own"
            }
            Self::HostNetwork => "remove hostNetwork: a sidecar cannot have the node's traffic",
            Self::MirrorPod => "create the pod through the API: static pods have no sidecar",
            Self::NamespaceDisabled => "label the namespace istio-injection=enabled",
            Self::OptedOutByLabel => "remove the label sidecar.istio.io/inject=false",
            Self::OptedOutByAnnotation => "remove the annotation sidecar.istio.io/inject: false",
            Self::OtherRevision => "set label istio.io/rev to this control plane's, or remove it",
            Self::NotSelected => {
                "label the namespace istio-injection=enabled or the pod sidecar.istio.io/inject=true"
            }
            Self::WindowsPod => "run it on Linux: Windows pods have no sidecar",
            Self::ForeignSidecar => "remove the other mesh's sidecar, istio-proxy or linkerd-proxy",
            Self::InvalidPod => "correct the pod: its containers cannot be read",
            Self::NotAPodCreate => "create a pod: a sidecar cannot be added to one that exists",
            Self::InvalidInjectValue => "set sidecar.istio.io/inject to true or false",
            Self::InvalidAnnotation => "correct the annotation's value",
            Self::UnsupportedAnnotation => "remove the annotation",
            Self::NameConflict => "rename the container or volume that has the injector's name",
            Self::AppUsesProxyGid => "set runAsGroup to another group than 1337",
            Self::PortConflict => {
                "move the container's port away from 15001, 15006, 15020, 15021 and 15090"
            }
            Self::BadRequest => "send an AdmissionReview of version v1",
            Self::Overloaded => "try again",
            Self::Internal => "report it: this is a fault of the injector's",
        })
    }
}
