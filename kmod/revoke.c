// SPDX-License-Identifier: GPL-2.0
/*
 * FLUSH commands, and the end of an attachment. All of it runs on a workqueue: neither a thread
 * that the daemon's answers depend on, nor one that holds anything a request may wait for.
 */
#include "internal.h"
#include <linux/pagemap.h>
#include <linux/writeback.h>

struct workqueue_struct *df_wq;

struct df_flush {
	struct work_struct	work;
	struct df_att		*att;
	struct distfuse_command	command;
	struct df_post		*post;
};

/* Lets waiters look again. Under RCU. */
void df_wake(struct df_sb *ds, u64 ino, int error)
{
	struct df_inode *di;

	spin_lock(&ds->lock);
	di = df_inode_peek(ds, ino);
	if (di) {
		spin_lock(&di->lock);
		di->need = 0;
		if (error < 0 && error >= -MAX_ERRNO) {
			di->refusal = error;
			WRITE_ONCE(di->refusals, di->refusals + 1);
		}
		spin_unlock(&di->lock);
		wake_up_all(&di->wq);
	}
	spin_unlock(&ds->lock);
}

static bool df_drained(struct distfuse_entry *entry)
{
	return !(atomic64_read_acquire(df_word(entry)) & DISTFUSE_COUNT_MASK);
}

static bool df_no_files(struct df_inode *di)
{
	bool empty;

	spin_lock(&di->lock);
	empty = list_empty(&di->files);
	spin_unlock(&di->lock);
	return empty;
}

/*
 * Writes all that is dirty and returns when the daemon has answered: what close does to an open
 * file waits for the requests themselves, where the ways through the page cache do not. Not
 * fsync: the daemon must have the pages, but nobody has asked for them to be durable, and that
 * costs round trips to all servers. The last file's release is waited for; then the daemon has
 * all, or gets it before that file's RELEASE.
 */
static int df_write_back(struct df_inode *di, u32 *flags)
{
	struct inode *inode = di->inode;
	struct file *file;
	int ret, before = 0;

	/* One that is neither to be had nor gone is being released, and says when it is. */
	wait_event(di->wq, (file = df_file_any(di)) || df_no_files(di));
	if (!file) {
		before = write_inode_now(inode, 1);
		/* Opened meanwhile: whoever did may wait for the lease, and close it only then. */
		file = df_file_any(di);
		if (!file) {
			*flags |= DISTFUSE_FLUSHED_NOFILE;
			return before;
		}
	}
	/*
	 * As an owner of locks that has none. An error stays the application's to see at its own
	 * fsync.
	 */
	ret = file->f_op->flush(file, (fl_owner_t)di);
	/* Not later by some other thread: the file would keep the mount busy. */
	__fput_sync(file);
	return before ?: ret;
}

static void df_describe(struct inode *inode, struct distfuse_event *event)
{
	struct timespec64 mtime = df_mtime(inode), ctime = df_ctime(inode);

	event->flags |= DISTFUSE_FLUSHED_INODE;
	event->size = i_size_read(inode);
	event->mtime = mtime.tv_sec;
	event->mtime_nsec = mtime.tv_nsec;
	event->ctime = ctime.tv_sec;
	event->ctime_nsec = ctime.tv_nsec;
}

static void df_flush_inode(struct df_flush *flush, struct df_inode *di,
			   struct distfuse_entry *entry)
{
	u32 flags = flush->command.flags;
	struct distfuse_event *event = &flush->post->event;
	struct address_space *mapping = di->inode->i_mapping;
	u64 word;
	int ret;

	wait_event(di->wq, df_drained(entry) || READ_ONCE(flush->att->dead));
	word = atomic64_read(df_word(entry));
	if (flags & (DISTFUSE_FLUSH_UNMAP | DISTFUSE_FLUSH_DROP)) {
		if (word & DISTFUSE_MAPPED)
			df_count(flush->att, DISTFUSE_UNMAPS);
		unmap_mapping_range(mapping, 0, 0, 0);
	}
	/*
	 * Not where nothing can be dirty: writing back takes the inode's lock, which a setattr
	 * may hold that the daemon answers only when it has got the exclusive lease from
	 * elsewhere.
	 */
	if (word & DISTFUSE_DIRTY) {
		df_count(flush->att, DISTFUSE_FLUSHES_DIRTY);
		WRITE_ONCE(di->flusher, current);
		event->error = df_write_back(di, &event->flags);
		WRITE_ONCE(di->flusher, NULL);
	}
	if (flags & DISTFUSE_FLUSH_DROP) {
		ret = invalidate_inode_pages2(mapping);
		if (ret && !event->error)
			event->error = ret;
		mutex_lock(&di->install_lock);
		di->version = DF_NO_VERSION;
		mutex_unlock(&di->install_lock);
	} else if (mapping->nrpages) {
		event->flags |= DISTFUSE_FLUSHED_KEPT;
	}
	df_describe(di->inode, event);
}

static void df_flush_entry(struct df_flush *flush, struct df_sb *ds)
{
	struct df_att *att = flush->att;
	u64 ino = flush->command.ino, clear = DISTFUSE_DIRTY;
	struct distfuse_entry *entry = df_entry_find(att, ino);
	struct df_inode *di;
	bool evicting;

	if (!entry) {
		flush->post->event.error = -ENOENT;
		return;
	}
	wait_event(ds->evict_wq, (di = df_inode_find(ds, ino, &evicting)) || !evicting);
	if (di) {
		df_flush_inode(flush, di, entry);
		iput(di->inode);
	} else {
		flush->post->event.flags |= DISTFUSE_FLUSHED_NOFILE;
	}
	if (flush->command.flags & DISTFUSE_FLUSH_UNMAP)
		clear |= DISTFUSE_MAPPED;
	atomic64_andnot(clear, df_word(entry));
}

static void df_flush_work(struct work_struct *work)
{
	struct df_flush *flush = container_of(work, struct df_flush, work);
	struct df_att *att = flush->att;
	struct super_block *sb = NULL;
	struct df_sb *ds;

	rcu_read_lock();
	ds = READ_ONCE(att->sb);
	if (ds && atomic_inc_not_zero(&ds->sb->s_active))
		sb = ds->sb;
	rcu_read_unlock();

	flush->post->event.type = DISTFUSE_EVENT_FLUSHED;
	flush->post->event.ino = flush->command.ino;
	flush->post->event.cookie = flush->command.cookie;
	if (sb) {
		df_flush_entry(flush, ds);
		df_count(att, DISTFUSE_FLUSHES);
	} else {
		flush->post->event.error = -ENODEV;
	}
	/* Frees it when it is in the ring. */
	if (READ_ONCE(att->dead))
		kfree(flush->post);
	else
		df_post(att, flush->post);
	/* This may be what ends the mount. */
	if (sb)
		deactivate_super(sb);
	df_att_put(att);
	kfree(flush);
}

void df_flush_start(struct df_att *att, const struct distfuse_command *command)
{
	/*
	 * The daemon, or whoever keeps it from ringing: memory that it would have to clean must
	 * not be waited for.
	 */
	struct df_flush *flush = kzalloc(sizeof(*flush), GFP_NOIO | __GFP_NOFAIL);

	flush->post = kzalloc(sizeof(*flush->post), GFP_NOIO | __GFP_NOFAIL);
	INIT_LIST_HEAD(&flush->post->link);
	flush->post->owned = true;
	flush->command = *command;
	flush->att = att;
	refcount_inc(&att->refs);
	INIT_WORK(&flush->work, df_flush_work);
	queue_work(df_wq, &flush->work);
}

/* Pages of a mount without a daemon: nobody may see them, and nobody is there to take them. */
static void df_discard(struct df_inode *di)
{
	struct distfuse_entry *entry = READ_ONCE(di->entry);
	struct inode *inode = di->inode;

	if (entry)
		wait_event(di->wq, df_drained(entry));
	mutex_lock(&di->install_lock);
	di->generation = 0;
	di->version = DF_NO_VERSION;
	di->epoch = 0;
	WRITE_ONCE(di->entry, NULL);
	mutex_unlock(&di->install_lock);
	unmap_mapping_range(inode->i_mapping, 0, 0, 0);
	if (mapping_tagged(inode->i_mapping, PAGECACHE_TAG_DIRTY))
		mapping_set_error(inode->i_mapping, -EIO);
	truncate_inode_pages(inode->i_mapping, 0);
}

/* The list changes while one of it is cleaned, so each remembers that it was. */
static struct df_inode *df_next_to_clean(struct df_sb *ds, int bucket, struct df_att *att)
{
	struct df_inode *di;

	spin_lock(&ds->lock);
	hlist_for_each_entry(di, &ds->inodes[bucket], hash) {
		if (di->cleaned == att || !igrab(di->inode))
			continue;
		di->cleaned = att;
		break;
	}
	spin_unlock(&ds->lock);
	return di;
}

void df_cleanup(struct work_struct *work)
{
	struct df_att *att = container_of(work, struct df_att, cleanup);
	struct super_block *sb = NULL;
	struct df_inode *di;
	struct df_sb *ds;
	int bucket;

	rcu_read_lock();
	ds = READ_ONCE(att->sb);
	if (ds && atomic_inc_not_zero(&ds->sb->s_active))
		sb = ds->sb;
	rcu_read_unlock();
	if (!sb)
		goto out;
	for (bucket = 0; bucket < HASH_SIZE(ds->inodes); bucket++)
		while ((di = df_next_to_clean(ds, bucket, att)) != NULL) {
			df_discard(di);
			iput(di->inode);
		}
	deactivate_super(sb);
out:
	df_att_put(att);
}
