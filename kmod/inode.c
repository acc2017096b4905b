// SPDX-License-Identifier: GPL-2.0
/* What is kept of an inode, and putting our tables into its place. */
#include "internal.h"

/*
 * FUSE keeps the node id right behind the generic inode; its structure is private. That it is
 * there is checked on the root, whose id is 1, before a mount is attached to.
 */
u64 df_node_id(const struct inode *inode)
{
	return *(const u64 *)(inode + 1);
}

/* The private part of an inode, made where there is none yet; NULL without memory. */
struct df_inode *df_inode_get(struct df_sb *ds, struct inode *inode)
{
	struct df_inode *di = df_i(inode), *old;
	int mode;

	if (likely(di))
		return di;
	di = kzalloc(sizeof(*di), GFP_KERNEL);
	if (!di)
		return NULL;
	di->inode = inode;
	di->sb = ds;
	di->ino = df_node_id(inode);
	di->version = DF_NO_VERSION;
	mutex_init(&di->install_lock);
	spin_lock_init(&di->lock);
	INIT_LIST_HEAD(&di->files);
	INIT_LIST_HEAD(&di->wholes);
	init_waitqueue_head(&di->wq);
	for (mode = 0; mode < ARRAY_SIZE(di->need_post); mode++)
		INIT_LIST_HEAD(&di->need_post[mode].link);
	INIT_LIST_HEAD(&di->drained_post.link);
	INIT_LIST_HEAD(&di->mapped_link);

	spin_lock(&ds->lock);
	old = inode->i_private;
	if (!old) {
		hash_add(ds->inodes, &di->hash, di->ino);
		/* Pairs with the acquire in df_i(). */
		smp_store_release(&inode->i_private, di);
	}
	spin_unlock(&ds->lock);
	if (!old)
		return di;
	kfree(di);
	return old;
}

/*
 * With the lock held; FUSE may have two inodes of one id for a moment, one of them on its way
 * out.
 */
struct df_inode *df_inode_peek(struct df_sb *ds, u64 ino)
{
	struct df_inode *di;

	hash_for_each_possible(ds->inodes, di, hash, ino)
		if (di->ino == ino)
			return di;
	return NULL;
}

/* With a reference to the inode. If there is none, says whether it is being evicted this moment. */
struct df_inode *df_inode_find(struct df_sb *ds, u64 ino, bool *evicting)
{
	struct df_inode *di, *found = NULL;

	*evicting = false;
	spin_lock(&ds->lock);
	hash_for_each_possible(ds->inodes, di, hash, ino) {
		if (di->ino != ino)
			continue;
		if (igrab(di->inode)) {
			found = di;
			break;
		}
		*evicting = true;
	}
	spin_unlock(&ds->lock);
	return found;
}

/* After the stock driver has let go of the inode: everything dirty was sent. */
void df_inode_evict(struct df_sb *ds, struct inode *inode)
{
	struct df_inode *di = df_i(inode);
	struct df_att *att;
	int mode;

	if (!di)
		return;
	df_map_forget(di);
	spin_lock(&ds->lock);
	hash_del(&di->hash);
	inode->i_private = NULL;
	spin_unlock(&ds->lock);
	/* None is removed before the mount ends. */
	list_for_each_entry_rcu(att, &ds->atts, link, true) {
		for (mode = 0; mode < ARRAY_SIZE(di->need_post); mode++)
			df_post_rescue(att, &di->need_post[mode]);
		df_post_rescue(att, &di->drained_post);
	}
	WARN_ON_ONCE(!list_empty(&di->files));
	/* Walkers of paths under RCU may look at it still. */
	kfree_rcu(di, rcu);
	wake_up_all(&ds->evict_wq);
}

/*
 * Points a new inode at our tables. Does not sleep: also called while names are looked up under
 * RCU.
 */
void df_adopt(struct df_sb *ds, struct inode *inode)
{
	if (S_ISREG(inode->i_mode)) {
		if (READ_ONCE(inode->i_fop) == &ds->fop)
			return;
		/* Pairs with the release in df_make_fop(): the tables are whole. */
		if (unlikely(!smp_load_acquire(&ds->stock_fop))) {
			spin_lock(&ds->lock);
			if (!ds->stock_fop) {
				df_make_riop(ds, inode->i_op);
				df_make_aops(ds, inode->i_mapping->a_ops);
				df_make_fop(ds, inode->i_fop);
			}
			spin_unlock(&ds->lock);
		}
		if (READ_ONCE(inode->i_mapping->a_ops) == ds->stock_aops)
			WRITE_ONCE(inode->i_mapping->a_ops, &ds->aops);
		if (READ_ONCE(inode->i_op) == ds->stock_riop)
			WRITE_ONCE(inode->i_op, &ds->riop);
		if (READ_ONCE(inode->i_fop) == ds->stock_fop)
			WRITE_ONCE(inode->i_fop, &ds->fop);
	} else if (S_ISDIR(inode->i_mode)) {
		if (READ_ONCE(inode->i_op) == &ds->diop)
			return;
		/* Pairs with the release in df_make_diop(). */
		if (unlikely(!smp_load_acquire(&ds->stock_diop))) {
			spin_lock(&ds->lock);
			if (!ds->stock_diop)
				df_make_diop(ds, inode->i_op);
			spin_unlock(&ds->lock);
		}
		if (READ_ONCE(inode->i_op) == ds->stock_diop)
			WRITE_ONCE(inode->i_op, &ds->diop);
	}
}

void df_file_track(struct df_inode *di, struct file *file)
{
	struct df_file *entry = kmalloc(sizeof(*entry), GFP_KERNEL | __GFP_NOFAIL);

	entry->file = file;
	spin_lock(&di->lock);
	list_add_tail(&entry->link, &di->files);
	spin_unlock(&di->lock);
}

/* After the stock release: who waits for one to be gone waits for what that sends. */
void df_file_untrack(struct df_inode *di, struct file *file)
{
	struct df_file *entry, *found = NULL;

	spin_lock(&di->lock);
	list_for_each_entry(entry, &di->files, link) {
		if (entry->file == file) {
			list_del(&entry->link);
			found = entry;
			break;
		}
	}
	spin_unlock(&di->lock);
	kfree(found);
	wake_up_all(&di->wq);
}

/* An open file of the inode, with a reference. */
struct file *df_file_any(struct df_inode *di)
{
	struct df_file *entry;
	struct file *file = NULL;

	spin_lock(&di->lock);
	list_for_each_entry(entry, &di->files, link) {
		file = df_get_live_file(&entry->file);
		if (file)
			break;
	}
	spin_unlock(&di->lock);
	return file;
}
