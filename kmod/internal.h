/* SPDX-License-Identifier: GPL-2.0 */
#ifndef DISTFUSE_INTERNAL_H
#define DISTFUSE_INTERNAL_H

#define pr_fmt(fmt) "distfuse: " fmt

#include <linux/completion.h>
#include <linux/fs.h>
#include <linux/hashtable.h>
#include <linux/hrtimer.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/refcount.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/sched/clock.h>
#include <linux/spinlock.h>
#include <linux/timekeeping.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/exportfs.h>
#include <linux/mm.h>

#include "include/uapi/distfuse.h"
#include "compat.h"

#define DF_INODE_BITS	12
#define DF_REFUSED_BITS	6
/* Of cached pages or names of which nothing is known. */
#define DF_NO_VERSION	(~0ULL)
/* So often tasks may look for answers in vain before they only sleep. */
#define DF_SPIN_CREDIT	16

struct df_sb;

/* An event on its way into the ring: waits in a list while that is full. */
struct df_post {
	struct list_head	link;
	struct distfuse_event	event;
	bool			queued;
	bool			owned;	/* by the list: to be freed */
};

/*
 * A read or write that the daemon does, whose buffer has the same number; or one for space,
 * without a buffer. Under df_att.call_lock but for post.
 */
struct df_call {
	struct df_post		post;
	struct completion	done;
	u64			result;
	u32			flags;
	int			error;
	bool			busy;
	bool			answered;
	bool			abandoned;
};

/* A page fault for which there was no space, to be told of when it is taken again. */
struct df_refused {
	struct task_struct	*task;
	struct inode		*inode;
	pgoff_t			page;
	unsigned long		when;
};

/*
 * An open file of the device, and what it is mapped as. The memory stays until the mount is gone,
 * also when the daemon is: so I/O needs no reference to use an entry.
 */
struct df_att {
	refcount_t		refs;
	struct df_sb		*sb;		/* under df_attach_lock */
	struct list_head	link;		/* in df_sb.atts */
	u32			flags;
	bool			dead;
	void			*map;
	size_t			map_size;
	struct distfuse_shared	*shared;
	u64			*counters;
	struct distfuse_event	*events;
	struct distfuse_command	*commands;
	struct distfuse_entry	*table;
	u32			nr_events, nr_commands, nr_entries, set_bits;

	spinlock_t		event_lock;	/* posts, event_head */
	struct list_head	posts;
	u64			event_head;
	wait_queue_head_t	event_wq;

	struct mutex		command_lock;	/* command_tail */
	u64			command_tail;
	atomic_t		lookers;	/* tasks in df_look() */
	u32			spin_ns;
	int			spin_credit;	/* a guess: of those who race one counts */
	u32			spin_skipped;

	spinlock_t		call_lock;	/* calls, refused */
	struct df_call		*calls;
	void			*buffers;
	u32			nr_buffers, nr_calls;
	wait_queue_head_t	call_wq;	/* for a call for space */
	struct df_refused	refused[1 << DF_REFUSED_BITS];

	struct hrtimer		term_timer;	/* under df_sb.mapped_lock, but for its own work */
	struct work_struct	term_work;
	struct work_struct	cleanup;
	struct dentry		*debugfs;
};

/*
 * A mount that has been attached to: copies of the stock driver's operation tables in which our
 * functions stand, each found again by container_of() from the pointer in inode, file, dentry, vma.
 */
struct df_sb {
	struct rcu_head		rcu;		/* first: freeing by it wants a small offset */
	struct super_block	*sb;
	struct df_att		*att;		/* the present one; NULL: the daemon is gone */
	struct list_head	atts;		/* all there have been; never shrinks */
	spinlock_t		lock;		/* setting up of the tables below, inodes */
	wait_queue_head_t	evict_wq;
	atomic64_t		epoch;		/* last given to a directory's names */
	struct mutex		mapped_lock;	/* mapped, and starting the timer that empties it */
	struct list_head	mapped;		/* inodes of which pages may be in page tables */

	struct super_operations		sop;
	struct dentry_operations	dop;
	struct export_operations	eop;
	struct inode_operations		riop;	/* of regular files */
	struct inode_operations		diop;	/* of directories */
	struct file_operations		fop;
	struct address_space_operations	aops;
	struct vm_operations_struct	vmop;
	const struct super_operations		*stock_sop;
	const struct dentry_operations		*stock_dop;
	const struct export_operations		*stock_eop;
	const struct inode_operations		*stock_riop;
	const struct inode_operations		*stock_diop;
	const struct file_operations		*stock_fop;
	const struct address_space_operations	*stock_aops;
	const struct vm_operations_struct	*stock_vmop;

	DECLARE_HASHTABLE(inodes, DF_INODE_BITS);
};

/* An inode with a lease, or in want of one. Hangs on i_private, which FUSE leaves alone. */
struct df_inode {
	struct hlist_node	hash;
	struct rcu_head		rcu;
	struct inode		*inode;
	struct df_sb		*sb;
	u64			ino;
	struct distfuse_entry	*entry;		/* last seen; a hint */
	u32			generation;	/* of the grant that is installed; 0: none */
	struct mutex		install_lock;	/* generation, version, epoch, unsettled */
	u32			unsettled;	/* answers on their way that will set the size */
	u64			version;	/* of pages or names */
	u64			epoch;		/* directories: what valid names are stamped with */

	spinlock_t		lock;		/* files, wholes, need, refusal */
	struct list_head	files;
	struct list_head	wholes;		/* writes under way of more than a page */
	u32			need;		/* modes asked for, not answered yet */
	u32			refusals;
	int			refusal;
	wait_queue_head_t	wq;

	struct list_head	mapped_link;	/* in df_sb.mapped */
	u32			mapped;		/* so often still to be unmapped at a term's end */

	struct task_struct	*flusher;	/* who flushes it for the daemon */
	struct df_att		*cleaned;	/* after its end */

	struct df_post		need_post[3];	/* by mode */
	struct df_post		drained_post;
};

/*
 * A write that may need more than one page, on the stack of its task. write_begin is told of one
 * page, and is the first to know for certain where an append goes: from here it learns how long
 * the whole is.
 */
struct df_whole {
	struct list_head	link;
	struct task_struct	*task;
	const struct iov_iter	*from;		/* NULL: there is space, or it goes in parts */
};

/* An open file of such an inode: what is needed to flush it. */
struct df_file {
	struct list_head	link;
	struct file		*file;
};

extern struct mutex df_attach_lock;

/* attach.c */
struct df_att *df_att_new(void);
void df_att_put(struct df_att *att);
long df_attach(struct df_att *att, struct distfuse_attach __user *arg);
void df_detach(struct df_att *att);
void df_sb_gone(struct df_sb *ds);

/* super.c */
struct df_sb *df_sb_of(struct super_block *sb);
int df_sb_interpose(struct super_block *sb, struct df_sb **found);

/* inode.c */
static inline struct df_inode *df_i(const struct inode *inode)
{
	/* Pairs with the release in df_inode_get(). */
	return smp_load_acquire(&inode->i_private);
}

u64 df_node_id(const struct inode *inode);
struct df_inode *df_inode_get(struct df_sb *ds, struct inode *inode);
struct df_inode *df_inode_find(struct df_sb *ds, u64 ino, bool *evicting);
struct df_inode *df_inode_peek(struct df_sb *ds, u64 ino);
void df_inode_evict(struct df_sb *ds, struct inode *inode);
void df_adopt(struct df_sb *ds, struct inode *inode);
void df_file_track(struct df_inode *di, struct file *file);
void df_file_untrack(struct df_inode *di, struct file *file);
struct file *df_file_any(struct df_inode *di);

/* table.c: the lease of an inode. Entering returns an entry to leave. */
struct distfuse_entry *df_entry_find(struct df_att *att, u64 ino);
struct distfuse_entry *df_entry_of(struct df_inode *di);
struct distfuse_entry *df_enter_slow(struct df_inode *di, u32 mode, u64 set, bool nowait);
struct distfuse_entry *df_try(struct df_inode *di, u32 mode, u64 set);
int df_wait(struct df_inode *di, u32 mode);
bool df_held(struct df_inode *di, u32 mode, bool may_sleep);
bool df_would_admit(struct df_inode *di, u32 mode);
void df_left_last(struct df_inode *di, u64 word);
bool df_is_dead(struct df_sb *ds);

/* install.c */
struct df_settling {
	u64	word;
	u32	generation;
};

void df_unsettle(struct df_inode *di, struct df_settling *s);
void df_settle(struct df_inode *di, const struct df_settling *s);
int df_install(struct df_inode *di, struct distfuse_entry *entry, u32 generation);
bool df_read_entry(const struct distfuse_entry *entry, struct distfuse_entry *copy);

/* ring.c */
void df_post(struct df_att *att, struct df_post *post);
void df_post_rescue(struct df_att *att, struct df_post *post);
void df_kick(struct df_att *att);
bool df_look(struct df_att *att, bool (*done)(void *of), void *of);
void df_slept(struct df_att *att, u64 since);
__poll_t df_poll_events(struct df_att *att);

/* call.c */
int df_calls_init(struct df_att *att, void *buffers, u32 count);
void df_calls_end(struct df_att *att);
void df_call_answered(struct df_att *att, const struct distfuse_command *command);
struct df_call *df_call_begin_space(struct df_att *att);
int df_call_wait(struct df_att *att, struct df_call *call);
void df_call_end(struct df_att *att, struct df_call *call);
bool df_call(struct df_inode *di, struct kiocb *iocb, struct iov_iter *it, u32 mode, ssize_t *ret);

/* term.c */
extern struct workqueue_struct *df_term_wq;
void df_term_init(struct df_att *att);
void df_term_begin(struct df_att *att);
void df_term_stop(struct df_att *att);
void df_map_note(struct df_inode *di);
void df_map_forget(struct df_inode *di);

/* cached.c */
bool df_read_cached(struct kiocb *iocb, struct iov_iter *to, ssize_t *ret);
bool df_write_page(struct kiocb *iocb, struct iov_iter *from, ssize_t *ret);
bool df_write_pages(struct kiocb *iocb, struct iov_iter *from, ssize_t *ret);

/* space.c */
/*
 * Of write_begin, seen by nobody else: this has to be asked for. The page cache knows no such
 * error.
 */
#define DF_NO_SPACE	(-ENOSR)
bool df_space_covers(const struct distfuse_entry *entry, u64 pos, u64 len);
int df_space_ask(struct df_inode *di, u64 pos, u64 len);
void df_whole_begin(struct df_inode *di, struct df_whole *whole,
		    const struct iov_iter *from);
size_t df_in_one(const struct iov_iter *from);
void df_whole_end(struct df_inode *di, struct df_whole *whole);
bool df_space_for_page(const struct df_inode *di, const struct distfuse_entry *entry, pgoff_t page);
vm_fault_t df_space_fault(struct vm_fault *vmf, struct df_inode *di);
void df_make_aops(struct df_sb *ds, const struct address_space_operations *stock);

/* revoke.c */
extern struct workqueue_struct *df_wq;
void df_flush_start(struct df_att *att, const struct distfuse_command *command);
void df_wake(struct df_sb *ds, u64 ino, int error);
void df_cleanup(struct work_struct *work);

/* tables of wrapped operations */
void df_make_fop(struct df_sb *ds, const struct file_operations *stock);
void df_make_riop(struct df_sb *ds, const struct inode_operations *stock);
void df_make_diop(struct df_sb *ds, const struct inode_operations *stock);
void df_make_dop(struct df_sb *ds, const struct dentry_operations *stock);
const struct vm_operations_struct *df_vmop(struct df_sb *ds,
					   const struct vm_operations_struct *stock);
void df_names_stamp(struct df_inode *dir, struct dentry *dentry, u64 before);
u64 df_names_epoch(struct df_inode *dir, bool may_sleep);

/* debugfs.c */
void df_debugfs_init(void);
void df_debugfs_exit(void);
void df_debugfs_add(struct df_att *att, const char *name);
void df_debugfs_remove(struct df_att *att);

static inline void df_count(struct df_att *att, enum distfuse_counter which)
{
	u64 *cell = att->counters + which + get_cpu() * DISTFUSE_COUNTERS_STRIDE;

	WRITE_ONCE(*cell, *cell + 1);
	put_cpu();
}

static inline void df_count_sb(struct df_sb *ds, enum distfuse_counter which)
{
	struct df_att *att = READ_ONCE(ds->att);

	if (likely(att))
		df_count(att, which);
}

/*
 * Whether the daemon may act still, and with it what it has delegated. Looked at before a lease
 * is entered, and again before what was read under it is returned, or a page written to: a task
 * that slept in between is found out. What is left is a task that is kept from running between
 * that look and what it does next; for that the others wait longer than a term before they take
 * the daemon for dead. The clock is behind by a tick at most, which is part of that, too.
 */
static inline bool df_in_term(const struct df_sb *ds)
{
	const struct df_att *att = READ_ONCE(ds->att);

	return likely(att) &&
	       likely(ktime_get_coarse_boottime_ns() < READ_ONCE(att->shared->term_end));
}

static inline atomic64_t *df_word(struct distfuse_entry *entry)
{
	return (atomic64_t *)&entry->word;
}

static inline u32 df_generation(u64 word)
{
	return word >> DISTFUSE_GENERATION_SHIFT;
}

static inline u32 df_mode(u64 word)
{
	return (word & DISTFUSE_MODE_MASK) >> DISTFUSE_MODE_SHIFT;
}

static inline bool df_admits(u64 word, u32 mode)
{
	return !(word & DISTFUSE_REVOKING) &&
	       (word & DISTFUSE_MODE_MASK) >= ((u64)mode << DISTFUSE_MODE_SHIFT);
}

/* Whether a word of an inode's entry is that of its installed grant, and lets somebody in. */
static inline bool df_admits_installed(u64 word, u32 mode, u32 generation)
{
	return df_admits(word, mode) && df_generation(word) == generation;
}

/*
 * Takes part in a lease that is held and installed; NULL if it is not. The word is read before the
 * owner of the entry: an entry that was given to another inode in between has another word.
 */
static inline struct distfuse_entry *df_enter_fast(struct df_inode *di, u32 mode, u64 set)
{
	struct distfuse_entry *entry = READ_ONCE(di->entry);
	/* Pairs with the release in df_install(): pages and size are those of the grant. */
	u32 generation = smp_load_acquire(&di->generation);
	s64 word;

	if (unlikely(!entry || !generation || !df_in_term(di->sb)))
		return NULL;
	word = atomic64_read_acquire(df_word(entry));
	do {
		if (unlikely(!df_admits_installed(word, mode, generation) ||
			     READ_ONCE(entry->ino) != di->ino))
			return NULL;
	} while (!atomic64_try_cmpxchg_acquire(df_word(entry), &word,
					       (word + 1) | DISTFUSE_USED | set));
	return entry;
}

/* A lease that was held and installed, to see later whether it still is. */
struct df_glance {
	struct distfuse_entry	*entry;
	u32			generation;
	u32			mode;
};

/* Looks at a lease, without entering. Whether it is within the term is to be seen at the end. */
static inline bool df_glance(struct df_inode *di, u32 mode, struct df_glance *glance)
{
	u64 word;

	glance->mode = mode;
	glance->entry = READ_ONCE(di->entry);
	/* Pairs with the release in df_install(): pages and size are those of the grant. */
	glance->generation = smp_load_acquire(&di->generation);
	if (unlikely(!glance->entry || !glance->generation))
		return false;
	word = atomic64_read_acquire(df_word(glance->entry));
	if (unlikely(!df_admits_installed(word, mode, glance->generation) ||
		     READ_ONCE(glance->entry->ino) != di->ino))
		return false;
	if (unlikely(!(word & DISTFUSE_USED)))
		atomic64_or(DISTFUSE_USED, df_word(glance->entry));
	return true;
}

/* Whether all that was done since is of a time at which the lease was held, within the term. */
static inline bool df_glance_holds(struct df_inode *di, const struct df_glance *glance)
{
	/* What was read meanwhile was read before this. */
	smp_rmb();
	return df_in_term(di->sb) &&
	       df_admits_installed(atomic64_read(df_word(glance->entry)), glance->mode,
				   glance->generation) &&
	       READ_ONCE(di->generation) == glance->generation;
}

/* An error pointer if the lease cannot be had: -EINTR, -ENOTCONN, what the daemon refused with. */
static inline struct distfuse_entry *df_enter(struct df_inode *di, u32 mode, u64 set)
{
	struct distfuse_entry *entry = df_enter_fast(di, mode, set);

	if (likely(entry)) {
		df_count_sb(di->sb, DISTFUSE_HITS);
		return entry;
	}
	return df_enter_slow(di, mode, set, false);
}

static inline void df_leave(struct df_inode *di, struct distfuse_entry *entry)
{
	u64 word = atomic64_dec_return_release(df_word(entry));

	if (unlikely((word & DISTFUSE_REVOKING) && !(word & DISTFUSE_COUNT_MASK)))
		df_left_last(di, word);
}

#endif
