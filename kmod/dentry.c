// SPDX-License-Identifier: GPL-2.0
/*
 * Names. One that was looked up under the directory's lease is stamped, in d_time, with the
 * directory's epoch: a number that no other directory has, and that changes when a grant says the
 * directory has changed. It is valid while the lease is held and the stamp is the directory's.
 */
#include "internal.h"
#include <linux/dcache.h>
#include <linux/namei.h>

static struct df_sb *df_of_dop(const struct dentry *dentry)
{
	return container_of(READ_ONCE(dentry->d_op), struct df_sb, dop);
}

/* 0 if the lease is not held. */
u64 df_names_epoch(struct df_inode *dir, bool may_sleep)
{
	if (!df_held(dir, DISTFUSE_SHARED, may_sleep))
		return 0;
	return READ_ONCE(dir->epoch);
}

/*
 * If the lease was held, or was the same when it came back, from before the question to its
 * answer.
 */
void df_names_stamp(struct df_inode *dir, struct dentry *dentry, u64 before)
{
	if (before && df_names_epoch(dir, false) == before)
		WRITE_ONCE(dentry->d_time, before);
}

static int df_d_init(struct dentry *dentry)
{
	struct df_sb *ds = df_of_dop(dentry);

	dentry->d_time = 0;
	return ds->stock_dop->d_init ? ds->stock_dop->d_init(dentry) : 0;
}

static int df_revalidate_in(struct df_sb *ds, struct inode *parent, struct dentry *dentry,
			    unsigned int flags)
{
	struct df_att *att = READ_ONCE(ds->att);
	bool ours = att && (att->flags & DISTFUSE_ATTACH_NAMES);
	bool may_sleep = !(flags & LOOKUP_RCU);
	struct df_inode *di = NULL;
	struct inode *inode;
	u64 epoch = 0;
	int ret;

	if (parent && ours)
		di = may_sleep ? df_inode_get(ds, parent) : df_i(parent);
	if (di)
		epoch = df_names_epoch(di, may_sleep);
	/* Those that create, or that were told ESTALE, want the server's word. */
	if (epoch && READ_ONCE(dentry->d_time) == epoch &&
	    !(flags & (LOOKUP_EXCL | LOOKUP_REVAL | LOOKUP_RENAME_TARGET))) {
		/*
		 * What has just come into being under a name that was known not to be there
		 * nobody may open as it is.
		 */
		inode = d_inode_rcu(dentry);
		if (inode)
			df_adopt(ds, inode);
		df_count(att, DISTFUSE_NAME_LOCAL);
		return 1;
	}
	/* Time alone makes no name valid: this has the stock driver ask its server. */
	if (ours)
		flags |= LOOKUP_REVAL;
	ret = ds->stock_dop->d_revalidate(dentry, flags);
	if (ret <= 0)
		return ret;
	if (att)
		df_count(att, DISTFUSE_NAME_REMOTE);
	inode = d_inode_rcu(dentry);
	if (inode)
		df_adopt(ds, inode);
	if (di && may_sleep)
		df_names_stamp(di, dentry, epoch);
	return ret;
}

static int df_d_revalidate(struct dentry *dentry, unsigned int flags)
{
	struct df_sb *ds = df_of_dop(dentry);
	struct dentry *parent;
	int ret;

	if (flags & LOOKUP_RCU) {
		parent = READ_ONCE(dentry->d_parent);
		return df_revalidate_in(ds, d_inode_rcu(parent), dentry, flags);
	}
	parent = dget_parent(dentry);
	ret = df_revalidate_in(ds, d_inode(parent), dentry, flags);
	dput(parent);
	return ret;
}

void df_make_dop(struct df_sb *ds, const struct dentry_operations *stock)
{
	ds->stock_dop = stock;
	ds->dop = *stock;
	ds->dop.d_init = df_d_init;
	ds->dop.d_revalidate = df_d_revalidate;
}
