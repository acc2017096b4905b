// SPDX-License-Identifier: GPL-2.0
/* Attachments: an open file of the device, a mount, and what happens when either goes first. */
#include "internal.h"
#include <linux/backing-dev.h>
#include <linux/file.h>
#include <linux/log2.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

/* Each keeps its memory until the mount ends. */
#define DF_MOST_ATTACHMENTS	64
#define DF_LEAST_RING		16
#define DF_MOST_RING		65536U

/* Who is attached to what. */
DEFINE_MUTEX(df_attach_lock);

struct df_att *df_att_new(void)
{
	struct df_att *att = kzalloc(sizeof(*att), GFP_KERNEL);

	if (!att)
		return NULL;
	refcount_set(&att->refs, 1);
	INIT_LIST_HEAD(&att->link);
	spin_lock_init(&att->event_lock);
	spin_lock_init(&att->call_lock);
	init_waitqueue_head(&att->call_wq);
	INIT_LIST_HEAD(&att->posts);
	init_waitqueue_head(&att->event_wq);
	mutex_init(&att->command_lock);
	INIT_WORK(&att->cleanup, df_cleanup);
	df_term_init(att);
	return att;
}

void df_att_put(struct df_att *att)
{
	if (!refcount_dec_and_test(&att->refs))
		return;
	/* Walkers of paths under RCU may look at the table still. */
	if (att->map)
		synchronize_rcu();
	kvfree(att->calls);
	vfree(att->map);
	kfree(att);
}

static u32 df_size(u32 wanted, u32 least, u32 most)
{
	return roundup_pow_of_two(clamp(wanted, least, most));
}

static int df_att_map(struct df_att *att, struct distfuse_attach *arg)
{
	u64 at = PAGE_SIZE;

	arg->entries = df_size(arg->entries, DISTFUSE_MIN_ENTRIES, DISTFUSE_MAX_ENTRIES);
	arg->events = df_size(arg->events, DF_LEAST_RING, DF_MOST_RING);
	arg->commands = df_size(arg->commands, DF_LEAST_RING, DF_MOST_RING);
	arg->buffers = min_t(u32, arg->buffers, DISTFUSE_MAX_BUFFERS);
	arg->cpus = nr_cpu_ids;
	arg->counters_offset = at;
	at += PAGE_ALIGN(sizeof(u64) * DISTFUSE_COUNTERS_STRIDE * nr_cpu_ids);
	arg->events_offset = at;
	at += PAGE_ALIGN(sizeof(struct distfuse_event) * arg->events);
	arg->commands_offset = at;
	at += PAGE_ALIGN(sizeof(struct distfuse_command) * arg->commands);
	arg->table_offset = at;
	at += PAGE_ALIGN(sizeof(struct distfuse_entry) * (u64)arg->entries);
	arg->buffers_offset = at;
	at += PAGE_ALIGN(DISTFUSE_BUFFER_SIZE * arg->buffers);
	arg->map_size = at;

	att->map = vmalloc_user(at);
	if (!att->map)
		return -ENOMEM;
	att->map_size = at;
	att->shared = att->map;
	att->counters = att->map + arg->counters_offset;
	att->events = att->map + arg->events_offset;
	att->commands = att->map + arg->commands_offset;
	att->table = att->map + arg->table_offset;
	att->nr_events = arg->events;
	att->nr_commands = arg->commands;
	att->nr_entries = arg->entries;
	att->set_bits = ilog2(arg->entries / DISTFUSE_WAYS);
	att->flags = arg->flags;
	if (num_possible_cpus() > 1)
		att->spin_ns = min(arg->spin_us, DISTFUSE_MAX_SPIN_US) * NSEC_PER_USEC;
	att->spin_credit = DF_SPIN_CREDIT;
	att->shared->abi = DISTFUSE_ABI_VERSION;
	att->shared->state = DISTFUSE_STATE_ATTACHED;
	att->shared->term_end = U64_MAX;
	att->shared->command_need_kick = 1;
	return df_calls_init(att, att->map + arg->buffers_offset, arg->buffers);
}

/*
 * FUSE lets a server have one per cent of the dirty memory, and holds it to that before any is
 * short.
 */
static void df_raise_limits(struct super_block *sb, u32 ratio)
{
	if (!ratio || !sb->s_bdi || sb->s_bdi == &noop_backing_dev_info)
		return;
	if (bdi_set_max_ratio(sb->s_bdi, min(ratio, 100U)))
		return;
	sb->s_bdi->capabilities &= ~BDI_CAP_STRICTLIMIT;
}

static int df_attach_sb(struct df_att *att, struct super_block *sb, struct distfuse_attach *arg)
{
	struct df_sb *ds;
	struct df_att *old;
	int ret, count = 0;

	ret = df_sb_interpose(sb, &ds);
	if (ret)
		return ret;
	if (ds->att)
		return -EBUSY;
	list_for_each_entry(old, &ds->atts, link) {
		/* The last daemon's pages must be gone before there are leases again. */
		if (work_busy(&old->cleanup))
			return -EAGAIN;
		count++;
	}
	if (count >= DF_MOST_ATTACHMENTS)
		return -ENOSPC;
	ret = df_att_map(att, arg);
	if (ret)
		return ret;
	refcount_inc(&att->refs);
	list_add_rcu(&att->link, &ds->atts);
	df_raise_limits(sb, arg->max_ratio);
	/* Pairs with the acquires in main.c: the mapping is whole. */
	smp_store_release(&att->sb, ds);
	/* And with what goes from the mount to the attachment, which is whole. */
	smp_store_release(&ds->att, att);
	df_term_begin(att);
	df_debugfs_add(att, sb->s_id);
	return 0;
}

long df_attach(struct df_att *att, struct distfuse_attach __user *user)
{
	struct distfuse_attach arg;
	struct super_block *sb;
	struct file *file;
	long ret;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	if (arg.abi != DISTFUSE_ABI_VERSION) {
		if (put_user(DISTFUSE_ABI_VERSION, &user->abi))
			return -EFAULT;
		return -EPROTONOSUPPORT;
	}
	if (arg.flags & ~(DISTFUSE_ATTACH_STAT | DISTFUSE_ATTACH_NAMES | DISTFUSE_ATTACH_ACCESS))
		return -EINVAL;
	file = fget_raw(arg.root_fd);
	if (!file)
		return -EBADF;
	sb = file->f_path.dentry->d_sb;
	mutex_lock(&df_attach_lock);
	if (att->map)
		ret = -EBUSY;
	else if (file->f_path.dentry != sb->s_root)
		ret = -EINVAL;
	else
		ret = df_attach_sb(att, sb, &arg);
	if (!ret && copy_to_user(user, &arg, sizeof(arg)))
		ret = -EFAULT;
	mutex_unlock(&df_attach_lock);
	fput(file);
	return ret;
}

/*
 * Closes all gates: the daemon is gone. Called as it exits, perhaps before its FUSE connection is
 * cut, so nothing is waited for here.
 */
static void df_att_kill(struct df_att *att)
{
	struct df_post *post, *next;
	u32 i;

	for (i = 0; i < att->nr_entries; i++) {
		atomic64_or(DISTFUSE_REVOKING, df_word(att->table + i));
		atomic64_andnot(DISTFUSE_MODE_MASK, df_word(att->table + i));
	}
	spin_lock(&att->event_lock);
	WRITE_ONCE(att->dead, true);
	list_for_each_entry_safe(post, next, &att->posts, link) {
		list_del_init(&post->link);
		post->queued = false;
		if (post->owned)
			kfree(post);
	}
	spin_unlock(&att->event_lock);
	df_calls_end(att);
}

static void df_wake_everyone(struct df_sb *ds)
{
	struct df_inode *di;
	int bucket;

	spin_lock(&ds->lock);
	hash_for_each(ds->inodes, bucket, di, hash) {
		spin_lock(&di->lock);
		di->need = 0;
		spin_unlock(&di->lock);
		wake_up_all(&di->wq);
	}
	spin_unlock(&ds->lock);
}

/* The file of the device is closed. */
void df_detach(struct df_att *att)
{
	struct df_sb *ds;

	mutex_lock(&df_attach_lock);
	ds = att->sb;
	if (ds) {
		df_debugfs_remove(att);
		df_att_kill(att);
		/* Before the mount may be attached to again. */
		smp_store_release(&ds->att, NULL);
		df_wake_everyone(ds);
		df_term_stop(att);
		/*
		 * The mount may end while that runs: it holds the attachment, and looks for the
		 * mount.
		 */
		refcount_inc(&att->refs);
		if (!queue_work(df_wq, &att->cleanup))
			df_att_put(att);
	}
	mutex_unlock(&df_attach_lock);
	df_att_put(att);
}

/* The mount has ended; the daemon may still have the device open. */
void df_sb_gone(struct df_sb *ds)
{
	struct df_att *att, *next;

	mutex_lock(&df_attach_lock);
	list_for_each_entry_safe(att, next, &ds->atts, link) {
		df_debugfs_remove(att);
		df_term_stop(att);
		WRITE_ONCE(att->sb, NULL);
		WRITE_ONCE(att->shared->state, DISTFUSE_STATE_GONE);
		wake_up_all(&att->event_wq);
		list_del_rcu(&att->link);
		df_att_put(att);
	}
	WRITE_ONCE(ds->att, NULL);
	mutex_unlock(&df_attach_lock);
}
