// SPDX-License-Identifier: GPL-2.0
/* A mount's super block: taking it over, and noticing its end. */
#include "internal.h"
#include <linux/dcache.h>
#include <linux/magic.h>

#ifndef FUSE_SUPER_MAGIC
#define FUSE_SUPER_MAGIC 0x65735546
#endif

static struct df_sb *df_of_sop(const struct super_block *sb)
{
	return container_of(READ_ONCE(sb->s_op), struct df_sb, sop);
}

static void df_evict_inode(struct inode *inode)
{
	struct df_sb *ds = df_of_sop(inode->i_sb);

	ds->stock_sop->evict_inode(inode);
	df_inode_evict(ds, inode);
}

/*
 * Of a flush for the daemon, size and times come with its end: a SETATTR would be a round trip
 * more.
 */
static int df_write_inode(struct inode *inode, struct writeback_control *wbc)
{
	struct df_sb *ds = df_of_sop(inode->i_sb);
	struct df_inode *di = df_i(inode);

	if (di && READ_ONCE(di->flusher) == current)
		return 0;
	return ds->stock_sop->write_inode(inode, wbc);
}

/* All inodes, files and names are gone; only walkers of paths under RCU may still look at ours. */
static void df_put_super(struct super_block *sb)
{
	struct df_sb *ds = df_of_sop(sb);

	WRITE_ONCE(sb->s_op, ds->stock_sop);
	if (ds->stock_sop->put_super)
		ds->stock_sop->put_super(sb);
	df_sb_gone(ds);
	kvfree_rcu(ds, rcu);
	module_put(THIS_MODULE);
}

static struct dentry *df_adopt_alias(struct df_sb *ds, struct dentry *dentry)
{
	if (!IS_ERR_OR_NULL(dentry) && d_inode(dentry))
		df_adopt(ds, d_inode(dentry));
	return dentry;
}

static struct df_sb *df_of_eop(const struct super_block *sb)
{
	return container_of(READ_ONCE(sb->s_export_op), struct df_sb, eop);
}

static struct dentry *df_fh_to_dentry(struct super_block *sb, struct fid *fid, int len, int type)
{
	struct df_sb *ds = df_of_eop(sb);

	return df_adopt_alias(ds, ds->stock_eop->fh_to_dentry(sb, fid, len, type));
}

static struct dentry *df_fh_to_parent(struct super_block *sb, struct fid *fid, int len, int type)
{
	struct df_sb *ds = df_of_eop(sb);

	return df_adopt_alias(ds, ds->stock_eop->fh_to_parent(sb, fid, len, type));
}

static struct dentry *df_get_parent(struct dentry *child)
{
	struct df_sb *ds = df_of_eop(child->d_sb);

	return df_adopt_alias(ds, ds->stock_eop->get_parent(child));
}

/* The state of a super block that was attached to before. */
struct df_sb *df_sb_of(struct super_block *sb)
{
	const struct super_operations *sop = READ_ONCE(sb->s_op);

	return sop && sop->evict_inode == df_evict_inode ? df_of_sop(sb) : NULL;
}

static bool df_is_ours_to_take(struct super_block *sb)
{
	return sb->s_magic == FUSE_SUPER_MAGIC && !strcmp(sb->s_type->name, "fuse") &&
	       sb->s_op && sb->s_op->evict_inode && sb->s_d_op && sb->s_d_op->d_revalidate &&
	       sb->s_root && df_node_id(d_inode(sb->s_root)) == 1 &&
	       !d_inode(sb->s_root)->i_private;
}

static bool df_has_files(struct super_block *sb)
{
	struct inode *inode;
	bool found = false;

	shrink_dcache_sb(sb);
	spin_lock(&sb->s_inode_list_lock);
	list_for_each_entry(inode, &sb->s_inodes, i_sb_list)
		if (S_ISREG(inode->i_mode) && !(inode->i_state & (I_FREEING | I_WILL_FREE)))
			found = true;
	spin_unlock(&sb->s_inode_list_lock);
	return found;
}

static void df_adopt_existing(struct df_sb *ds)
{
	struct super_block *sb = ds->sb;
	struct inode *inode;
	struct dentry *dentry;

	spin_lock(&sb->s_inode_list_lock);
	list_for_each_entry(inode, &sb->s_inodes, i_sb_list) {
		df_adopt(ds, inode);
		spin_lock(&inode->i_lock);
		hlist_for_each_entry(dentry, &inode->i_dentry, d_u.d_alias)
			if (READ_ONCE(dentry->d_op) == ds->stock_dop) {
				dentry->d_time = 0;
				WRITE_ONCE(dentry->d_op, &ds->dop);
			}
		spin_unlock(&inode->i_lock);
	}
	spin_unlock(&sb->s_inode_list_lock);
}

/* Puts our tables into a super block, once in its life. With df_attach_lock held. */
int df_sb_interpose(struct super_block *sb, struct df_sb **found)
{
	struct df_sb *ds;

	*found = df_sb_of(sb);
	if (*found)
		return 0;
	if (!df_is_ours_to_take(sb))
		return -EINVAL;
	/* A file that is open already would go on past us. */
	if (df_has_files(sb))
		return -EBUSY;
	ds = kvzalloc(sizeof(*ds), GFP_KERNEL);
	if (!ds)
		return -ENOMEM;
	ds->sb = sb;
	INIT_LIST_HEAD(&ds->atts);
	spin_lock_init(&ds->lock);
	hash_init(ds->inodes);
	init_waitqueue_head(&ds->evict_wq);
	mutex_init(&ds->mapped_lock);
	INIT_LIST_HEAD(&ds->mapped);

	ds->stock_sop = sb->s_op;
	ds->sop = *sb->s_op;
	ds->sop.evict_inode = df_evict_inode;
	ds->sop.put_super = df_put_super;
	if (ds->stock_sop->write_inode)
		ds->sop.write_inode = df_write_inode;
	df_make_dop(ds, sb->s_d_op);
	ds->stock_eop = sb->s_export_op;
	if (ds->stock_eop) {
		ds->eop = *ds->stock_eop;
		if (ds->eop.fh_to_dentry)
			ds->eop.fh_to_dentry = df_fh_to_dentry;
		if (ds->eop.fh_to_parent)
			ds->eop.fh_to_parent = df_fh_to_parent;
		if (ds->eop.get_parent)
			ds->eop.get_parent = df_get_parent;
	}
	/* New inodes first come by names: those must be ours before any is looked up. */
	smp_wmb();
	WRITE_ONCE(sb->s_d_op, &ds->dop);
	if (ds->stock_eop)
		WRITE_ONCE(sb->s_export_op, &ds->eop);
	/* Whoever follows the pointer finds a table that is whole. */
	smp_wmb();
	WRITE_ONCE(sb->s_op, &ds->sop);
	df_adopt_existing(ds);
	/* Until the super block's end: files, names and mappings point into our tables. */
	__module_get(THIS_MODULE);
	*found = ds;
	return 0;
}
