//! The xenstore wire protocol, without I/O: Xen's `public/io/xs_wire.h` and
//! `docs/misc/xenstore.txt`.
//!
//! A message is a header of four 32-bit words in host byte order and up to 4096 bytes of payload,
//! mostly strings that each end with a NUL. Both ends use this file: [`encode`] makes a message,
//! an [`Inbox`] finds messages in a stream that arrives in pieces.

use crate::limits::XENSTORE_PAYLOAD_MAX;
use crate::units::{DomId, parse_decimal};
use crate::xen::{NodeAccess, Permission};

/// Bytes of a header: `sizeof(struct xsd_sockmsg)`.
pub const HEADER_BYTES: usize = 16;

/// Bytes of the largest message.
pub const MESSAGE_MAX: usize = HEADER_BYTES + XENSTORE_PAYLOAD_MAX;

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a message is: `enum xsd_sockmsg_type`. 20 (RESTRICT) is no longer valid.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Op {
            $($(#[$doc])* $name = $number,)*
        }

        impl Op {
            /// Every operation.
            pub const ALL: &[Op] = &[$(Op::$name),*];
        }

        impl TryFrom<u32> for Op {
            type Error = u32;

            /// Gives the number back if it names no operation.
            fn try_from(number: u32) -> Result<Op, u32> {
                match number {
                    $($number => Ok(Op::$name),)*
                    unknown => Err(unknown),
                }
            }
        }
    };
}

operations! {
    /// A command to the daemon itself.
    Control = 0,
    /// `path|` -> `name|*`
    Directory = 1,
    /// `path|` -> value
    Read = 2,
    /// `path|` -> `permission|+`
    GetPerms = 3,
    /// `path|token|`
    Watch = 4,
    /// `path|token|`
    Unwatch = 5,
    /// `|` -> `id|`
    TransactionStart = 6,
    /// `T|` or `F|`
    TransactionEnd = 7,
    /// `domid|gfn|port|`
    Introduce = 8,
    /// `domid|`
    Release = 9,
    /// `domid|` -> `path|`
    GetDomainPath = 10,
    /// `path|` and the value
    Write = 11,
    /// `path|`
    Mkdir = 12,
    /// `path|`
    Rm = 13,
    /// `path|permission|+`
    SetPerms = 14,
    /// `path|token|`, unsolicited, from the server only.
    WatchEvent = 15,
    /// The name of an errno value, from the server only.
    Error = 16,
    /// `domid|` -> `T|` or `F|`
    IsDomainIntroduced = 17,
    /// `domid|`
    Resume = 18,
    /// `domid|target domid|`
    SetTarget = 19,
    /// `|`
    ResetWatches = 21,
    /// `path|offset|` -> `generation|name|*`, and one more NUL at the end of the list.
    DirectoryPart = 22,
    /// `[domid|]` -> `features|`
    GetFeature = 23,
    /// `domid|features|`
    SetFeature = 24,
    /// `[[domid|]quota|]` -> `value|`
    GetQuota = 25,
    /// `[domid|]quota|value|`
    SetQuota = 26,
}

/// A message's first 16 bytes: `struct xsd_sockmsg`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The number of an [`Op`]; not checked until it is converted.
    pub kind: u32,
    /// Chosen by the client, echoed in the answer; 0 in a watch event.
    pub req_id: u32,
    /// The transaction, 0 for none.
    pub tx_id: u32,
    /// Bytes of payload.
    pub len: u32,
}

impl Header {
    /// The header as it is sent.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let words = [self.kind, self.req_id, self.tx_id, self.len];
        for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    /// Reads a header.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Header {
        let (words, _) = bytes.as_chunks::<4>();
        let word = |index: usize| u32::from_ne_bytes(words[index]);
        Header { kind: word(0), req_id: word(1), tx_id: word(2), len: word(3) }
    }
}

/// One whole message in an [`Inbox`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Its header; `len` is the payload's length.
    pub header: Header,
    /// At most [`XENSTORE_PAYLOAD_MAX`] bytes.
    pub payload: &'a [u8],
}

/// A payload over [`XENSTORE_PAYLOAD_MAX`]. A receiver closes the connection, because it can't tell where the
/// next message starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a xenstore message of {len} bytes exceeds the protocol's limit of {XENSTORE_PAYLOAD_MAX}")]
pub struct TooLong {
    /// The payload's claimed or intended length.
    pub len: usize,
}

/// Appends a message whose payload is `parts`, one after another.
pub fn encode(
    out: &mut Vec<u8>,
    kind: Op,
    req_id: u32,
    tx_id: u32,
    parts: &[&[u8]],
) -> Result<(), TooLong> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    if len > XENSTORE_PAYLOAD_MAX {
        return Err(TooLong { len });
    }
    let wire_len = u32::try_from(len).map_err(|_| TooLong { len })?;
    out.extend_from_slice(&Header { kind: kind as u32, req_id, tx_id, len: wire_len }.to_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
    Ok(())
}

/// The first message in `stream` and its whole length; `None`: it is not complete yet.
pub fn decode(stream: &[u8]) -> Result<Option<(Message<'_>, usize)>, TooLong> {
    let Some((head, rest)) = stream.split_first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let header = Header::from_bytes(head);
    let len = usize::try_from(header.len).unwrap_or(usize::MAX);
    if len > XENSTORE_PAYLOAD_MAX {
        return Err(TooLong { len });
    }
    Ok(rest.get(..len).map(|payload| (Message { header, payload }, HEADER_BYTES + len)))
}

/// Bytes that arrived and were not yet taken as messages. Its memory is fixed: two messages of the largest
/// size.
#[derive(Debug)]
pub struct Inbox {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Default for Inbox {
    fn default() -> Inbox {
        Inbox { bytes: vec![0; 2 * MESSAGE_MAX].into_boxed_slice(), start: 0, end: 0 }
    }
}

impl Inbox {
    /// Room for bytes from the stream; never empty after [`Inbox::take`] returned `None`.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.bytes[self.end..]
    }

    /// Records that the first `count` bytes of [`Inbox::space`] were filled.
    pub fn filled(&mut self, count: usize) {
        assert!(count <= self.bytes.len() - self.end);
        self.end += count;
    }

    /// Removes and returns the next message; `None`: more bytes must come first.
    pub fn take(&mut self) -> Result<Option<Message<'_>>, TooLong> {
        let Some((message, taken)) = decode(&self.bytes[self.start..self.end])? else {
            return Ok(None);
        };
        self.start += taken;
        Ok(Some(message))
    }
}

/// The NUL-terminated strings of a payload. Bytes after the last NUL are left out.
pub fn strings(payload: &[u8]) -> impl Iterator<Item = &[u8]> {
    payload.split_inclusive(|&byte| byte == 0).filter_map(|string| string.strip_suffix(&[0]))
}

/// A permission as it is sent, without its NUL: a letter and a decimal domid.
pub fn permission_text(permission: Permission) -> String {
    let letter = match permission.access {
        NodeAccess::None => 'n',
        NodeAccess::Read => 'r',
        NodeAccess::Write => 'w',
        NodeAccess::Both => 'b',
    };
    format!("{letter}{}", permission.domid)
}

/// Reads a permission; `None`: it is not a known letter and a real domid.
pub fn parse_permission(text: &[u8]) -> Option<Permission> {
    let (letter, digits) = text.split_first()?;
    let access = match letter {
        b'n' => NodeAccess::None,
        b'r' => NodeAccess::Read,
        b'w' => NodeAccess::Write,
        b'b' => NodeAccess::Both,
        _ => return None,
    };
    Some(Permission { domid: parse_domid(digits)?, access })
}

/// Reads a decimal domid.
pub fn parse_domid(digits: &[u8]) -> Option<DomId> {
    let raw: u32 = parse_decimal(std::str::from_utf8(digits).ok()?)?;
    DomId::try_from(raw).ok()
}

/// The errors that cross the wire, by name: `xsd_errors`.
const ERRORS: [(&str, i32); 16] = [
    ("EINVAL", libc::EINVAL),
    ("EACCES", libc::EACCES),
    ("EEXIST", libc::EEXIST),
    ("EISDIR", libc::EISDIR),
    ("ENOENT", libc::ENOENT),
    ("ENOMEM", libc::ENOMEM),
    ("ENOSPC", libc::ENOSPC),
    ("EIO", libc::EIO),
    ("ENOTEMPTY", libc::ENOTEMPTY),
    ("ENOSYS", libc::ENOSYS),
    ("EROFS", libc::EROFS),
    ("EBUSY", libc::EBUSY),
    ("EAGAIN", libc::EAGAIN),
    ("EISCONN", libc::EISCONN),
    ("E2BIG", libc::E2BIG),
    ("EPERM", libc::EPERM),
];

/// An errno value's name on the wire; EINVAL for one that has none.
pub fn error_name(errno: i32) -> &'static str {
    ERRORS.iter().find(|(_, number)| *number == errno).map_or("EINVAL", |(name, _)| name)
}

/// The errno value of a name on the wire.
pub fn error_number(name: &[u8]) -> Option<i32> {
    ERRORS.iter().find(|(known, _)| known.as_bytes() == name).map(|(_, number)| *number)
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    #[test]
    fn the_header_is_four_words_in_host_order() {
        let mut out = Vec::new();
        encode(&mut out, Op::Read, 7, 9, &[b"/a", b"\0"]).unwrap();
        let words: Vec<u32> = out[..HEADER_BYTES]
            .chunks_exact(4)
            .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(words, [2, 7, 9, 3]);
        assert_eq!(&out[HEADER_BYTES..], b"/a\0");
    }

    #[test]
    fn operations_have_the_numbers_of_the_specification() {
        for &op in Op::ALL {
            assert_eq!(Op::try_from(op as u32), Ok(op));
        }
        assert_eq!(Op::ResetWatches as u32, 21);
        assert_eq!(Op::SetQuota as u32, 26);
        for number in [20, 27, 65535] {
            assert_eq!(Op::try_from(number), Err(number));
        }
    }

    #[test]
    fn a_message_over_the_limit_is_neither_made_nor_awaited() {
        let long = vec![0; XENSTORE_PAYLOAD_MAX + 1];
        let mut out = Vec::new();
        assert_eq!(encode(&mut out, Op::Write, 0, 0, &[&long]), Err(TooLong { len: 4097 }));
        assert!(out.is_empty());
        let header = Header { kind: 2, req_id: 0, tx_id: 0, len: 4097 };
        assert!(decode(&header.to_bytes()).is_err());
    }

    #[test]
    fn strings_end_with_a_nul() {
        let of = |payload: &'static [u8]| strings(payload).collect::<Vec<_>>();
        assert_eq!(of(b"a\0\0bc\0rest"), [b"a".as_slice(), b"", b"bc"]);
        assert!(of(b"").is_empty());
        assert!(of(b"no end").is_empty());
    }

    #[test]
    fn errors_travel_by_name() {
        for (name, number) in ERRORS {
            assert_eq!(error_number(name.as_bytes()), Some(number));
            assert_eq!(error_name(number), name);
        }
        assert_eq!(error_name(libc::ENODEV), "EINVAL");
        assert_eq!(error_number(b"ENODEV"), None);
    }

    #[test]
    fn permissions_need_a_known_letter_and_a_real_domid() {
        for text in ["r0", "w5", "b32751", "n1"] {
            let permission = parse_permission(text.as_bytes()).unwrap();
            assert_eq!(permission_text(permission), text);
        }
        for text in ["", "r", "x1", "r-1", "r32752", "r 1", "1r", "r99999999999"] {
            assert_eq!(parse_permission(text.as_bytes()), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn messages_come_back_as_sent_however_the_stream_is_cut(
            sent in vec(
                (0..Op::ALL.len(), any::<u32>(), any::<u32>(), vec(any::<u8>(), 0..=XENSTORE_PAYLOAD_MAX)),
                1..6,
            ),
            cut in 1usize..5000,
        ) {
            let mut stream = Vec::new();
            for (op, req_id, tx_id, payload) in &sent {
                encode(&mut stream, Op::ALL[*op], *req_id, *tx_id, &[payload]).unwrap();
            }
            let mut inbox = Inbox::default();
            let mut got = Vec::new();
            while !stream.is_empty() {
                let count = inbox.space().len().min(cut).min(stream.len());
                inbox.space()[..count].copy_from_slice(&stream[..count]);
                inbox.filled(count);
                stream.drain(..count);
                while let Some(Message { header, payload }) = inbox.take().unwrap() {
                    got.push((header.kind, header.req_id, header.tx_id, payload.to_vec()));
                }
            }
            let sent: Vec<_> = sent
                .into_iter()
                .map(|(op, req_id, tx_id, payload)| (Op::ALL[op] as u32, req_id, tx_id, payload))
                .collect();
            prop_assert_eq!(got, sent);
        }

        #[test]
        fn any_bytes_are_messages_or_an_error_within_fixed_memory(noise in vec(any::<u8>(), 0..20_000)) {
            let mut inbox = Inbox::default();
            let mut rest = noise.as_slice();
            'stream: while !rest.is_empty() {
                let space = inbox.space();
                prop_assert!(!space.is_empty() && space.len() <= 2 * MESSAGE_MAX);
                let count = space.len().min(rest.len());
                space[..count].copy_from_slice(&rest[..count]);
                inbox.filled(count);
                rest = &rest[count..];
                loop {
                    match inbox.take() {
                        Ok(Some(message)) => prop_assert!(message.payload.len() <= XENSTORE_PAYLOAD_MAX),
                        Ok(None) => break,
                        Err(_) => break 'stream,
                    }
                }
            }
        }

        #[test]
        fn any_payload_can_be_parsed(payload in vec(any::<u8>(), 0..64)) {
            for string in strings(&payload) {
                parse_permission(string);
                error_number(string);
                prop_assert!(!string.contains(&0));
            }
        }
    }
}
