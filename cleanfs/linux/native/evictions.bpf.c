// Copy the clean pages of one mount that the kernel evicts from its page cache into a ring buffer.
//
// The tracepoint is called for each folio that leaves the page cache, whatever the cause, with the lock of the mapping
// held and the folio still in it. So a record was reserved before the kernel could miss the page, and before whatever
// dropped it has returned: the order of records in the ring is the order of these events.
//
// The folio says why it leaves. Reclaim freezes the reference count at 0 first, and refuses a dirty folio; so do
// drop_caches and fadvise. Truncation and invalidation hold a reference.
#include <linux/bpf.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "eviction.h"

typedef _Bool bool;

#define GIB 30

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct super_block {
	__u32 s_dev;
};

struct inode {
	struct super_block *i_sb;
	unsigned long i_ino;
	long long i_size;
};

struct address_space {
	struct inode *host;
	unsigned long flags;
};

typedef struct {
	int counter;
} atomic_t;

struct page {
	unsigned long flags;
};

struct folio {
	unsigned long flags;
	struct address_space *mapping;
	unsigned long index;
	atomic_t _refcount;
};

typedef struct {
	unsigned long f;
} memdesc_flags_t;

struct folio___memdesc { // Linux 6.18
	memdesc_flags_t flags;
};

struct folio___nr_pages { // Linux 6.15
	unsigned int _nr_pages;
};

struct folio___folio_nr_pages {
	unsigned int _folio_nr_pages;
};

#pragma clang attribute pop

enum pageflags { PG_writeback = 1, PG_uptodate = 3, PG_dirty = 4, PG_head = 6 };
enum mapping_flags { AS_EXITING = 4 };

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} ring SEC(".maps");

volatile struct eviction_settings settings;
struct eviction_counts counts;

static bool is_set(unsigned long flags, unsigned long bit)
{
	return flags >> bit & 1;
}

static unsigned long flags_of(struct folio *folio)
{
	struct folio___memdesc *newer = (void *)folio;

	if (bpf_core_field_exists(newer->flags.f))
		return newer->flags.f;
	return folio->flags;
}

static unsigned int pages_of(struct folio *folio, unsigned long flags)
{
	struct folio___nr_pages *newer = (void *)folio;
	struct folio___folio_nr_pages *older = (void *)folio;

	if (!is_set(flags, bpf_core_enum_value(enum pageflags, PG_head)))
		return 1;
	if (bpf_core_field_exists(newer->_nr_pages))
		return newer->_nr_pages;
	if (bpf_core_field_exists(older->_folio_nr_pages))
		return older->_folio_nr_pages;
	return 1;
}

static void count(__u64 *counter, __u64 pages)
{
	__sync_fetch_and_add(counter, pages);
}

// A pointer as a number: the verifier allows no arithmetic with pointers to kernel objects.
static __u64 number_of(const void *pointer)
{
	__u64 number = 0;

	bpf_probe_read_kernel(&number, sizeof number, &pointer);
	return number;
}

static __u64 scaled(__u64 folio)
{
	return folio * (EVICTION_PAGE_SIZE / bpf_core_type_size(struct page));
}

// Find where the direct map begins, in terms of `eviction_settings.direct_map`: a folio of known content, and a pointer
// to a kernel object, both of which are in it. It and the array of pages begin at a multiple of 1 GiB, so a candidate
// for each GiB is enough. 0 if none has the content.
static __u64 seek_direct_map(__u64 folio, __u64 object)
{
	const __u64 within = scaled(folio) & ((1ULL << GIB) - 1);

	for (int i = 0; i < EVICTION_CANDIDATES; i++) {
		const __u64 away = settings.trial_base + i;
		const __u64 gib = (object >> GIB) + (away & 1 ? 0 - (away + 1) / 2 : away / 2);
		const __u64 address = gib << GIB | within;
		__u64 mark = 0;

		if (bpf_probe_read_kernel(&mark, sizeof mark, (void *)address) == 0 && mark == settings.trial_mark)
			return address - scaled(folio);
	}
	return 0;
}

static void report(struct folio *folio, struct inode *inode, __u32 cause, __u64 direct_map, unsigned int pages)
{
	const __u64 address = scaled(number_of(folio)) + direct_map;

	for (unsigned int i = 0; i < EVICTION_MAX_FOLIO_PAGES && i < pages; i++) {
		struct eviction *record = bpf_ringbuf_reserve(&ring, sizeof *record, 0);
		__u64 wake;

		if (!record) {
			count(&counts.lost, pages - i);
			return;
		}
		record->inode = inode->i_ino;
		record->index = folio->index + i;
		record->file_size = inode->i_size;
		record->direct_map = direct_map;
		record->cause = cause;
		record->readable = direct_map && bpf_probe_read_kernel(record->page, sizeof record->page,
								       (void *)(address + i * EVICTION_PAGE_SIZE)) == 0;
		if (!record->readable)
			count(&counts.unreadable, 1);
		wake = bpf_ringbuf_query(&ring, BPF_RB_AVAIL_DATA) >= settings.wake_bytes ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP;
		bpf_ringbuf_submit(record, wake);
	}
	if (pages > EVICTION_MAX_FOLIO_PAGES)
		count(&counts.lost, pages - EVICTION_MAX_FOLIO_PAGES);
}

SEC("tp_btf/mm_filemap_delete_from_page_cache")
int BPF_PROG(page_leaves_cache, struct folio *folio)
{
	struct address_space *mapping = folio->mapping;
	struct inode *inode = mapping->host;
	unsigned long flags;
	unsigned int pages;
	__u32 cause;
	bool unclean;

	if (inode->i_sb->s_dev != settings.device || settings.paused)
		return 0;
	flags = flags_of(folio);
	pages = pages_of(folio, flags);
	cause = folio->_refcount.counter == 0 ? EVICTION_RECLAIMED :
		is_set(mapping->flags, bpf_core_enum_value(enum mapping_flags, AS_EXITING)) ? EVICTION_INODE_EVICTED :
											     EVICTION_REMOVED;
	if (settings.trial_inode && inode->i_ino == settings.trial_inode) {
		const __u64 found = settings.seeks ? seek_direct_map(number_of(folio), number_of(mapping)) : settings.direct_map;

		report(folio, inode, cause, found, pages);
		return 0;
	}
	count(&counts.seen, pages);
	unclean = !is_set(flags, bpf_core_enum_value(enum pageflags, PG_uptodate)) ||
		  is_set(flags, bpf_core_enum_value(enum pageflags, PG_dirty)) ||
		  is_set(flags, bpf_core_enum_value(enum pageflags, PG_writeback));
	if (cause == EVICTION_REMOVED)
		count(&counts.removed, pages);
	else if (unclean)
		count(&counts.unclean, pages);
	else
		report(folio, inode, cause, settings.direct_map, pages);
	return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
