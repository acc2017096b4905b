/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * What the DistFUSE daemon and the kernel extension distfuse share.
 *
 * An open file of /dev/distfuse that has attached to a mount is mapped at offset 0: flags and
 * ring indices, counters, two rings, the lease table. docs/kernel-abi.md has the protocol;
 * kmod/abi is the Rust side and is checked against this header.
 */
#ifndef _UAPI_LINUX_DISTFUSE_H
#define _UAPI_LINUX_DISTFUSE_H

#include <linux/types.h>
#include <linux/ioctl.h>

/* Moves with every change that an older daemon or module would misunderstand. */
#define DISTFUSE_ABI_VERSION	4

#define DISTFUSE_DEVICE		"distfuse"

/*
 * The word of an entry. The count is lowest, so that entering and leaving are an addition; the
 * generation is highest and moves with every grant to an inode that held nothing, so that no word
 * ever comes back and a compare-and-swap that was prepared for another tenure, or another inode,
 * fails.
 */
#define DISTFUSE_COUNT_MASK	0x0000000000ffffffULL
#define DISTFUSE_MODE_SHIFT	24
#define DISTFUSE_MODE_MASK	0x0000000003000000ULL
#define DISTFUSE_NONE		0
#define DISTFUSE_SHARED		1
#define DISTFUSE_EXCLUSIVE	2
/* Set by the daemon: nobody enters any more. */
#define DISTFUSE_REVOKING	0x0000000004000000ULL
/* Set by the kernel, cleared by the daemon's next grant: tasks sleep until a WAKE. */
#define DISTFUSE_WAITERS	0x0000000008000000ULL
/* Set by the kernel on entering to write, cleared when a FLUSH is done. */
#define DISTFUSE_DIRTY		0x0000000010000000ULL
/* Set by the kernel before pages get mapped, cleared by a FLUSH that unmaps. */
#define DISTFUSE_MAPPED		0x0000000020000000ULL
/* Set by the kernel on entering, cleared by a grant: the grant was good for something. */
#define DISTFUSE_USED		0x0000000040000000ULL
#define DISTFUSE_GENERATION_SHIFT 32

/* What of the attributes of an entry is right (entry.valid). */
#define DISTFUSE_ATTR_DATA	0x1	/* size, mtime, ctime: to be installed with the grant */
#define DISTFUSE_ATTR_ALL	0x2	/* all: stat and permission are answered from them */
#define DISTFUSE_ATTR_XATTRS	0x4	/* extended attributes: a write asks for capabilities */

/*
 * Nodes take the lease from each other: what is short and finds it not held is a CALL, which
 * costs the lease once, instead of a NEED, after which what was written has to be flushed, too.
 */
#define DISTFUSE_HINT_CALL	0x1

/*
 * Two cache lines. The attributes do not fit beside word and identity into one, and the second is
 * read only when a grant is installed and by stat. Written by the daemon but for the word;
 * everything behind ino is under seq, which is odd while it is changed.
 */
struct distfuse_entry {
	__u64	word;
	__u64	ino;		/* the FUSE node id; 0 if the entry is free */
	__u64	version;	/* of the contents that the grant is for */
	__u64	since;		/* caches of any version from here on are those of version */
	__u32	seq;
	__u32	valid;		/* DISTFUSE_ATTR_* */
	__u32	mode;
	__u32	nlink;
	__u32	uid;
	__u32	gid;
	__u32	atime_nsec;
	__u32	hints;		/* DISTFUSE_HINT_*; not under seq */
	__u64	size;
	__u64	blocks;
	__s64	mtime;
	__s64	ctime;
	__s64	atime;
	__u32	mtime_nsec;
	__u32	ctime_nsec;
	/*
	 * Under the exclusive lease: what is written from space_from to before space_to can be
	 * stored, for all of it is allocated or set aside. Elsewhere the daemon is asked first
	 * (DISTFUSE_CALL_SPACE).
	 */
	__u64	space_from;
	__u64	space_to;
} __attribute__((aligned(64)));

/* An inode's entry is in one of the ways of one set, which follows from the node id. */
#define DISTFUSE_WAYS		8
#define DISTFUSE_MIN_ENTRIES	64
#define DISTFUSE_MAX_ENTRIES	(1U << 22)
#define DISTFUSE_HASH_FACTOR	0x9e3779b97f4a7c15ULL

/* set_bits is log2(entries / DISTFUSE_WAYS), which is not 0. */
static inline __u64 distfuse_set(__u64 ino, __u32 set_bits)
{
	return (ino * DISTFUSE_HASH_FACTOR) >> (64 - set_bits);
}

/* Kernel to daemon. */
#define DISTFUSE_EVENT_NEED	1	/* tasks wait for `mode`; always to be answered by a WAKE */
#define DISTFUSE_EVENT_DRAINED	2	/* the last one inside has left while REVOKING was set */
#define DISTFUSE_EVENT_FLUSHED	3	/* the FLUSH with this cookie is done */
#define DISTFUSE_EVENT_CALL	4	/* read or write this; always to be answered by an ANSWER */

/* event.flags of FLUSHED */
#define DISTFUSE_FLUSHED_INODE	0x1	/* the kernel has the inode: size and times are its */
#define DISTFUSE_FLUSHED_NOFILE	0x2	/* no open file: wait for RELEASE of every handle, too */
#define DISTFUSE_FLUSHED_KEPT	0x4	/* pages are still in the page cache */

/* event.flags of CALL */
#define DISTFUSE_CALL_WRITE	0x1	/* the buffer has the data; else it is to be filled */
#define DISTFUSE_CALL_KILL_PRIV	0x2	/* the writer may not keep set-user-id bits */
#define DISTFUSE_CALL_SPACE	0x4	/* only make sure that it can be written */

/* A buffer of this size belongs to each CALL, from the event on to the ANSWER the daemon's. */
#define DISTFUSE_BUFFER_SIZE	16384U
#define DISTFUSE_MAX_BUFFERS	256
#define DISTFUSE_MAX_SPIN_US	1000
/* CALLs for space have no buffer; their numbers are those behind the buffers'. */
#define DISTFUSE_SPACE_CALLS	16

struct distfuse_event {
	__u32	type;
	__u32	flags;
	__u64	ino;
	__u32	mode;		/* NEED; CALL: length in bytes */
	__u32	cookie;		/* FLUSHED: that of the command; CALL: number of its buffer */
	__s32	error;		/* FLUSHED: negative errno of writing back, or 0 */
	__u32	mtime_nsec;
	__u64	size;		/* CALL: offset in the file */
	__s64	mtime;
	__s64	ctime;
	__u32	ctime_nsec;
	__u32	reserved;
};

/* Daemon to kernel. */
#define DISTFUSE_COMMAND_WAKE	1	/* waiters look again, or fail with `error` */
#define DISTFUSE_COMMAND_FLUSH	2	/* while REVOKING: wait for count, do what flags say */
#define DISTFUSE_COMMAND_ANSWER	3	/* the CALL is done, or failed with `error` */

/* command.flags of FLUSH; dirty pages are always written */
#define DISTFUSE_FLUSH_UNMAP	0x1	/* take pages out of page tables, clear MAPPED */
#define DISTFUSE_FLUSH_DROP	0x2	/* and out of the page cache */

/* command.flags of ANSWER */
#define DISTFUSE_ANSWER_AGAIN	0x1	/* nothing is done: the kernel has or wants the lease */

struct distfuse_command {
	__u32	type;
	__u32	flags;
	__u64	ino;
	__u32	cookie;
	__s32	error;		/* WAKE, ANSWER: negative errno, or 0 */
	__u64	result;		/* ANSWER: bytes read, written, or that there is space for */
};

/* Counters of a processor; the sum over all of them counts. */
enum distfuse_counter {
	DISTFUSE_HITS,			/* entered at once */
	DISTFUSE_MISSES,		/* had to ask the daemon */
	DISTFUSE_WAITS,			/* slept for a lease */
	DISTFUSE_NOWAITS,		/* were told EAGAIN instead */
	DISTFUSE_INSTALLS,		/* grants installed */
	DISTFUSE_PAGES_KEPT,		/* inodes whose pages were right for a new grant */
	DISTFUSE_PAGES_DROPPED,		/* inodes whose pages were dropped */
	DISTFUSE_DRAINS,		/* DRAINED events */
	DISTFUSE_FLUSHES,		/* FLUSH commands carried out */
	DISTFUSE_FLUSHES_DIRTY,		/* those that found the entry dirty */
	DISTFUSE_UNMAPS,
	DISTFUSE_FAULT_RETRIES,		/* page faults that slept for a lease */
	DISTFUSE_BUFFER_FAULTS,		/* I/O that faulted its buffer in and went on */
	DISTFUSE_WAKEUPS_MADE,		/* events for which the daemon was woken */
	DISTFUSE_WAKEUPS_AVOIDED,	/* events that it found by itself */
	DISTFUSE_KICKS,			/* doorbells of the daemon */
	DISTFUSE_STAT_LOCAL,		/* stat answered here */
	DISTFUSE_STAT_REMOTE,
	DISTFUSE_NAME_LOCAL,		/* names found valid here */
	DISTFUSE_NAME_REMOTE,
	DISTFUSE_PERMISSION_LOCAL,
	DISTFUSE_EVENTS_DELAYED,	/* found the event ring full */
	DISTFUSE_CALLS,			/* reads and writes that the daemon was asked to do */
	DISTFUSE_CALLS_AGAIN,		/* those that it left to the kernel */
	DISTFUSE_SPINS,			/* answers that came while the task still looked for them */
	DISTFUSE_SPACE_ASKED,		/* writes and faults that had to ask for space */
	DISTFUSE_TERM_UNMAPS,		/* inodes unmapped at the end of a term */
	DISTFUSE_NR_COUNTERS
};

#define DISTFUSE_COUNTERS_STRIDE 32	/* __u64 for each processor */

#define DISTFUSE_STATE_ATTACHED	1
#define DISTFUSE_STATE_GONE	2	/* the mount is gone */

/* At offset 0. One cache line for each writer of each ring. Indices only grow. */
struct distfuse_shared {
	__u32	abi;
	__u32	state;
	/*
	 * Daemon: until when it may act, nanoseconds of CLOCK_BOOTTIME. From then on the kernel
	 * lets nobody enter, and takes pages out of page tables, until it is later again.
	 */
	__u64	term_end;
	__u32	reserved0[12];
	__u64	event_head;		/* kernel: next event to be written */
	__u32	event_overflow;		/* kernel: more wait for room; KICK when there is */
	__u32	reserved1[13];
	__u64	event_tail;		/* daemon: next event to be read */
	__u32	event_need_wakeup;	/* daemon: about to sleep in poll */
	__u32	reserved2[13];
	__u64	command_head;		/* daemon: next command to be written */
	__u64	reserved3[7];
	__u64	command_tail;		/* kernel: next command to be read */
	__u32	command_need_kick;	/* kernel: nobody reads or is about to; KICK */
	__u32	reserved4[13];
} __attribute__((aligned(64)));

/* attach.flags */
#define DISTFUSE_ATTACH_STAT	0x1	/* answer stat under a lease */
#define DISTFUSE_ATTACH_NAMES	0x2	/* hold names valid under the directory's lease */
#define DISTFUSE_ATTACH_ACCESS	0x4	/* default_permissions: check them under a lease */

struct distfuse_attach {
	__u32	abi;			/* in: the caller's; out: the module's */
	__s32	root_fd;		/* in: the mount's root, may be O_PATH */
	__u32	flags;
	__u32	max_ratio;		/* in: per cent of dirty memory, 0: as it is */
	__u32	entries;		/* in: wanted; out: a power of two */
	__u32	events;			/* the same, of the rings */
	__u32	commands;
	__u32	cpus;			/* out: processors that may count */
	__u64	map_size;		/* out: to be mapped at offset 0 */
	__u64	counters_offset;	/* out: where in it */
	__u64	events_offset;
	__u64	commands_offset;
	__u64	table_offset;
	__u64	buffers_offset;
	__u32	buffers;		/* in: wanted; out: how many; 0: there are no CALLs */
	__u32	spin_us;		/* in: a task looks so long before it sleeps */
	__u64	reserved[2];
};

/* Stays as it is in every version. */
#define DISTFUSE_IOC_VERSION	_IOR('~', 0x40, __u32)
/* EPROTONOSUPPORT: another ABI version. EBUSY: attached already, or files are open. */
#define DISTFUSE_IOC_ATTACH	_IOWR('~', 0x41, struct distfuse_attach)
/* Reads the command ring; writes events that found their ring full. */
#define DISTFUSE_IOC_KICK	_IO('~', 0x42)

#endif
