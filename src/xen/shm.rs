//! Memory that a guest can write while we look at it.
//!
//! [`GuestPages`] owns a mapping, [`SharedPage`] views one as a ring, [`GuestBuf`] names a piece of
//! memory. These types and [`crate::engine`]'s guarded copies are all that touches guest memory, and none of
//! them ever forms a Rust reference or slice over it. Words of a ring are read by one volatile or atomic load
//! each; data is copied once. Only the copy is validated and used (XSA-155).
#![allow(unsafe_code)]

use std::alloc::Layout;
use std::num::NonZeroU16;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes in a granted page: 4 KiB, regardless of the page size of either domain's kernel.
pub const PAGE_BYTES: usize = 4096;
/// [`PAGE_BYTES`] as a buffer's length.
pub const PAGE_LEN: u32 = 4096;
const _: () = assert!(PAGE_LEN as usize == PAGE_BYTES);

/// A contiguous range of another domain's pages, mapped here.
///
/// It is neither `Clone` nor `Drop`: it goes back to the [`super::Grants`] that made it, which needs its own
/// state to unmap it. Dropping that `Grants` unmaps what was not given back.
#[derive(Debug)]
pub struct GuestPages {
    base: NonNull<u8>,
    count: usize,
    cookie: u64,
    registration: Option<Registration>,
}

/// The name by which an engine knows memory that was registered with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registration(pub NonZeroU16);

impl GuestPages {
    /// Takes ownership of `count` pages at `base`. `cookie` is the platform's own name for the
    /// mapping (gntdev's index).
    ///
    /// # Safety
    /// `base` must be page-aligned and the pages mapped and (for a writable mapping) writable until
    /// the value is given to [`super::Grants::unmap`].
    pub unsafe fn from_raw(base: NonNull<u8>, count: usize, cookie: u64) -> Self {
        assert!(base.as_ptr().addr().is_multiple_of(PAGE_BYTES) && count > 0);
        GuestPages { base, count, cookie, registration: None }
    }

    /// First byte of the range.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// How many pages.
    pub fn count(&self) -> usize {
        self.count
    }

    /// What the platform passed to [`GuestPages::from_raw`].
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// The name by which an engine knows the range, if any.
    pub fn registration(&self) -> Option<Registration> {
        self.registration
    }

    /// Sets the name by which an engine knows the range, for its buffers from now on.
    pub fn set_registration(&mut self, registration: Option<Registration>) {
        self.registration = registration;
    }

    /// The whole range.
    pub fn whole(&self) -> GuestBuf {
        let bytes = self.count * PAGE_BYTES;
        let len = u32::try_from(bytes).expect("a batch of pages is far below 4 GiB");
        GuestBuf { address: self.base, len, registration: self.registration }
    }

    /// One whole page of the range.
    ///
    /// # Panics
    /// If `index` is not below [`GuestPages::count`].
    pub fn page(&self, index: usize) -> GuestBuf {
        assert!(index < self.count);
        // SAFETY: index is inside the range, which is mapped contiguously (from_raw).
        let address = unsafe { self.base.add(index * PAGE_BYTES) };
        GuestBuf { address, len: PAGE_LEN, registration: self.registration }
    }
}

/// A piece of memory that a guest may be writing to, or of our own memory: an address and a length, for the
/// kernel (`iovec`) or for a byte-wise copy.
///
/// It is plain data and does not keep the mapping alive: before a queue unmaps pages, it makes sure that no
/// request in flight holds a piece of them.
#[derive(Clone, Copy, Debug)]
pub struct GuestBuf {
    address: NonNull<u8>,
    len: u32,
    registration: Option<Registration>,
}

impl GuestBuf {
    /// No memory at all.
    pub const EMPTY: GuestBuf =
        GuestBuf { address: NonNull::dangling(), len: 0, registration: None };

    /// Names `len` bytes at `address`.
    ///
    /// # Safety
    /// They must stay mapped and writable for as long as the value or a copy of it is used.
    pub unsafe fn from_raw(address: NonNull<u8>, len: u32) -> Self {
        GuestBuf { address, len, registration: None }
    }

    /// The same bytes, with the name by which an engine knows their memory.
    pub fn registered(self, registration: Option<Registration>) -> GuestBuf {
        GuestBuf { registration, ..self }
    }

    /// The name by which an engine knows the memory that it lies in, if any.
    pub fn registration(self) -> Option<Registration> {
        self.registration
    }

    /// Where it starts. Only the kernel and guarded copies dereference it.
    pub fn address(self) -> NonNull<u8> {
        self.address
    }

    /// Bytes.
    pub fn len(self) -> u32 {
        self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// A part of it; `None` if that reaches past the end.
    pub fn part(self, offset: u32, len: u32) -> Option<GuestBuf> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: offset + len <= self.len, checked above.
        let address = unsafe { self.address.add(offset as usize) };
        Some(GuestBuf { address, len, ..self })
    }

    /// Copies `from` into the guest's memory, as many bytes as both hold.
    pub fn copy_from(self, from: &[u8]) {
        let len = from.len().min(self.len as usize);
        // SAFETY: len bytes are valid on both sides; a guest that writes meanwhile garbles only
        // its own data, which nothing here reads back.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.address.as_ptr(), len) };
    }

    /// Copies the guest's memory into `to`, as many bytes as both hold. If the guest writes meanwhile, the
    /// copy is any mixture of old and new bytes; the caller checks and uses only the copy.
    pub fn copy_to(self, to: &mut [u8]) {
        let len = to.len().min(self.len as usize);
        // SAFETY: len bytes are valid on both sides, and `to` is ours alone.
        unsafe { std::ptr::copy_nonoverlapping(self.address.as_ptr(), to.as_mut_ptr(), len) };
    }

    /// Copies to another piece, as many bytes as both hold.
    pub fn copy_into(self, to: GuestBuf) {
        let len = self.len.min(to.len) as usize;
        // SAFETY: len bytes are valid on both sides (from_raw, part); `copy` allows overlap.
        unsafe { std::ptr::copy(self.address.as_ptr(), to.address.as_ptr(), len) };
    }

    /// Fills it with zeroes.
    pub fn zero(self) {
        // SAFETY: the piece is mapped and writable (from_raw, part).
        unsafe { std::ptr::write_bytes(self.address.as_ptr(), 0, self.len as usize) };
    }
}

/// Zeroed pages of our own: bounce memory for data that is copied instead of mapped.
#[derive(Debug)]
pub struct LocalPages {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns its memory alone, and hands out only addresses.
unsafe impl Send for LocalPages {}

impl LocalPages {
    /// Allocates `count` pages.
    ///
    /// # Panics
    /// If `count` is 0. If memory is exhausted the process ends, as with any allocation.
    pub fn new(count: usize) -> LocalPages {
        assert!(count > 0);
        let layout = Layout::array::<[u8; PAGE_BYTES]>(count)
            .and_then(|layout| layout.align_to(PAGE_BYTES))
            .expect("a count of pages that fits memory");
        // SAFETY: the layout is not empty.
        let base = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) });
        LocalPages { base: base.unwrap_or_else(|| std::alloc::handle_alloc_error(layout)), layout }
    }

    /// How many pages.
    pub fn count(&self) -> usize {
        self.layout.size() / PAGE_BYTES
    }

    /// One whole page. When the owner drops this value, no page of it may be in use.
    ///
    /// # Panics
    /// If `index` is not below [`LocalPages::count`].
    pub fn page(&self, index: usize) -> GuestBuf {
        self.run(index, 1)
    }

    /// `count` whole pages from `first` on, as [`LocalPages::page`].
    ///
    /// # Panics
    /// If they are not all inside, or are 4 GiB or more.
    pub fn run(&self, first: usize, count: usize) -> GuestBuf {
        assert!(first < self.count() && count <= self.count() - first);
        let len = u32::try_from(count * PAGE_BYTES).expect("less than 4 GiB");
        // SAFETY: first is inside the allocation.
        let address = unsafe { self.base.add(first * PAGE_BYTES) };
        GuestBuf { address, len, registration: None }
    }

    /// The same memory, seen as words: a ring without a hypervisor, for tests and benches.
    pub fn into_shared(self) -> SharedPage {
        SharedPage { base: self.base, len: self.layout.size(), memory: Memory::Local(self) }
    }
}

impl Drop for LocalPages {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), self.layout) };
    }
}

/// The pages of one ring, seen as words. The two ends agree on the layout; `blkif::ring` knows it.
#[derive(Debug)]
pub struct SharedPage {
    base: NonNull<u8>,
    len: usize,
    memory: Memory,
}

// SAFETY: its memory belongs to the process and stays mapped for the life of the value (from_raw,
// over, LocalPages), whichever thread has it; every access is a volatile or atomic one.
unsafe impl Send for SharedPage {}

/// What owns the memory of a [`SharedPage`].
#[derive(Debug)]
enum Memory {
    Elsewhere,
    Guest(GuestPages),
    Local(#[expect(dead_code, reason = "held to be dropped")] LocalPages),
}

/// A word that can be read from and written to shared memory in one access.
pub trait Word: Copy + private::Sealed {}
impl Word for u32 {}
impl Word for u64 {}

mod private {
    pub trait Sealed {}
    impl Sealed for u32 {}
    impl Sealed for u64 {}
}

impl SharedPage {
    /// Views `len` bytes at `base` as shared memory.
    ///
    /// # Safety
    /// They must stay mapped and writable for the life of the value, and `base` be page-aligned.
    pub unsafe fn from_raw(base: NonNull<u8>, len: usize) -> Self {
        assert!(base.as_ptr().addr().is_multiple_of(PAGE_BYTES));
        SharedPage { base, len, memory: Memory::Elsewhere }
    }

    /// Views mapped pages, and owns them until [`SharedPage::into_guest_pages`].
    pub fn over(pages: GuestPages) -> SharedPage {
        let len = pages.count() * PAGE_BYTES;
        SharedPage { base: pages.base(), len, memory: Memory::Guest(pages) }
    }

    /// Gives back the pages of [`SharedPage::over`]; `None` for other memory.
    pub fn into_guest_pages(self) -> Option<GuestPages> {
        match self.memory {
            Memory::Guest(pages) => Some(pages),
            Memory::Elsewhere | Memory::Local(_) => None,
        }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The 32-bit word at a byte offset, for atomic access.
    ///
    /// # Panics
    /// If the offset is unaligned or out of range.
    #[inline]
    pub fn atomic(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: `word` checked alignment and range; the other end may write at any time, which
        // an atomic allows; the memory outlives self (from_raw).
        unsafe { AtomicU32::from_ptr(self.word::<u32>(offset, 1)) }
    }

    /// Loads `N` words from a byte offset, each once, in ascending order.
    ///
    /// # Panics
    /// If the offset is unaligned or the words reach past the end.
    #[inline]
    pub fn load<T: Word + Default, const N: usize>(&self, offset: usize) -> [T; N] {
        let mut words = [T::default(); N];
        self.load_into(offset, &mut words);
        words
    }

    /// Loads words from a byte offset into `words`, each once, in ascending order.
    ///
    /// # Panics
    /// If the offset is unaligned or the words reach past the end.
    #[inline]
    pub fn load_into<T: Word>(&self, offset: usize, words: &mut [T]) {
        let first = self.word::<T>(offset, words.len());
        for (index, word) in words.iter_mut().enumerate() {
            // SAFETY: `word` checked alignment and range for all of them.
            *word = unsafe { first.add(index).read_volatile() };
        }
    }

    /// Loads words from a byte offset on, lazily, each once, in ascending order.
    ///
    /// # Panics
    /// If the offset is unaligned or the words reach past the end.
    #[inline]
    pub fn words<T: Word>(&self, offset: usize, count: usize) -> impl Iterator<Item = T> {
        let first = self.word::<T>(offset, count);
        // SAFETY: `word` checked alignment and range for all of them.
        (0..count).map(move |index| unsafe { first.add(index).read_volatile() })
    }

    /// Prefetches the cache line of a byte, without waiting for it; does nothing past the end.
    #[inline]
    pub fn prefetch(&self, offset: usize) {
        #[cfg(target_arch = "x86_64")]
        if offset < self.len {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a hint, which reads nothing; offset is inside the range.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.base.as_ptr().add(offset).cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = offset;
    }

    /// Stores words from a byte offset on, each once, in ascending order.
    ///
    /// # Panics
    /// If the offset is unaligned or the words reach past the end.
    #[inline]
    pub fn store<T: Word>(&self, offset: usize, words: &[T]) {
        let first = self.word::<T>(offset, words.len());
        for (index, word) in words.iter().enumerate() {
            // SAFETY: `word` checked alignment and range for all of them.
            unsafe { first.add(index).write_volatile(*word) };
        }
    }

    #[inline]
    fn word<T: Word>(&self, offset: usize, count: usize) -> *mut T {
        let bytes = count * size_of::<T>();
        assert!(
            offset.is_multiple_of(align_of::<T>())
                && offset <= self.len
                && bytes <= self.len - offset
        );
        // SAFETY: offset is inside the range (checked above).
        unsafe { self.base.as_ptr().add(offset).cast() }
    }
}

/// Makes our stores visible before any later load: between publishing `rsp_prod` or `req_event`
/// and reading what the other end published (`xen_mb` of Xen's `public/io/ring.h`).
#[inline]
pub fn full_fence() {
    std::sync::atomic::fence(Ordering::SeqCst);
}

#[cfg(test)]
mod test {
    use super::*;

    #[repr(C, align(4096))]
    struct Page([u8; PAGE_BYTES]);

    #[test]
    fn a_part_never_reaches_past_its_page() {
        let mut page = Box::new(Page([0; PAGE_BYTES]));
        // SAFETY: the box outlives the value.
        let pages = unsafe { GuestPages::from_raw(NonNull::from(&mut page.0[0]), 1, 0) };
        let whole = pages.page(0);
        assert_eq!(whole.part(512, 3584).map(GuestBuf::len), Some(3584));
        assert!(whole.part(512, 3585).is_none());
        assert!(whole.part(u32::MAX, 2).is_none());
    }

    #[test]
    fn words_go_in_and_out_whole() {
        let mut page = Box::new(Page([0; PAGE_BYTES]));
        // SAFETY: the box outlives the value.
        let shared = unsafe { SharedPage::from_raw(NonNull::from(&mut page.0[0]), PAGE_BYTES) };
        shared.store(64, &[0x1122_3344_5566_7788_u64, 9]);
        assert_eq!(shared.load::<u32, 2>(64), [0x5566_7788, 0x1122_3344]);
        shared.atomic(8).store(7, Ordering::Release);
        assert_eq!(shared.load::<u32, 1>(8), [7]);
    }

    #[test]
    #[should_panic]
    fn a_word_past_the_end_is_our_own_bug() {
        let mut page = Box::new(Page([0; PAGE_BYTES]));
        // SAFETY: the box outlives the value.
        let shared = unsafe { SharedPage::from_raw(NonNull::from(&mut page.0[0]), PAGE_BYTES) };
        shared.load::<u64, 2>(PAGE_BYTES - 8);
    }
}
